"""Chains of a stem, stages of blocks and a head: the structure of most networks of this project."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from bqat_jax.blocks.block_network import BlockNetwork

CUTS = ('stage', 'block')
Make = Callable[[], nn.Module]


class Chain(nn.Module):
    """Named submodules that run one after another.

    Attributes:
        parts: (name, constructor) of each; a submodule is called as `submodule(x, train)`.
    """

    parts: tuple[tuple[str, Make], ...]

    def setup(self):
        """Makes the submodules."""
        for name, make in self.parts:
            setattr(self, name, make())

    def __call__(self, x: Any, train: bool = False) -> Any:
        """Runs all submodules on x."""
        for name, _ in self.parts:
            x = getattr(self, name)(x, train)
        return x


def _call(module: Any, inputs: Any, train: bool) -> Any:
    return module(inputs, train)


def split_chain(stem: Make, stages: Sequence[Mapping[str, Make]], head: Make, cut: str) -> BlockNetwork:
    """Returns a chain cut into blocks.

    Args:
        stem: constructor of the module before the first block.
        stages: for each stage, the constructors of its blocks by name.
        head: constructor of the module after the last block.
        cut: 'stage', 'block', or comma-separated names of blocks after which to cut; blocks after the last cut form one
            more block.

    Raises:
        ValueError: for another cut.
    """
    parts = {name: make for stage in stages for name, make in stage.items()}
    if cut == 'stage':
        blocks = tuple(tuple(stage) for stage in stages)
    elif cut == 'block':
        blocks = tuple((name,) for name in parts)
    else:
        blocks = _split_after(tuple(parts), tuple(name.strip() for name in cut.split(',')))
    chain = Chain((('stem', stem), *parts.items(), ('head', head)))
    return BlockNetwork(chain, tuple(block[-1] for block in blocks), _call)


def _split_after(names: tuple[str, ...], ends: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    positions = [names.index(end) + 1 if end in names else 0 for end in ends]
    if 0 in positions or sorted(set(positions)) != positions:
        raise ValueError(
            f'cut={",".join(ends)!r}: must be one of {", ".join(CUTS)}, or some of these names, in this order, '
            f'separated by commas: {", ".join(names)}.'
        )
    starts, stops = [0, *positions], [*positions, len(names)]
    return tuple(names[start:stop] for start, stop in zip(starts, stops, strict=True) if start < stop)


def stage_blocks(number: int, makes: Sequence[Make]) -> dict[str, Make]:
    """Returns the blocks of stage `number` (from 1) by name: 'stage1_block1', ..."""
    return {f'stage{number}_block{position}': make for position, make in enumerate(makes, 1)}
