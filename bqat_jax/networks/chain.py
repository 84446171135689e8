"""A stem, stages of blocks and a head that run one after another: the shape of all networks here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from bqat_jax.networks.cut import CutNetwork, run_submodules

CUTS = ('stage', 'block')
DTYPES = ('float32', 'bfloat16')
Make = Callable[[], nn.Module]


class Chain(nn.Module):
    """Named submodules that run one after another.

    Attributes:
        parts: name and constructor of each; a submodule is called as `submodule(x, train)`.
    """

    parts: tuple[tuple[str, Make], ...]

    def setup(self):
        """Makes the submodules."""
        for name, make in self.parts:
            setattr(self, name, make())

    def __call__(self, x: Any, train: bool = False) -> Any:
        """Runs all submodules on x."""
        return run_submodules(self, x, [name for name, _ in self.parts], train)


def cut_chain(stem: Make, stages: Sequence[Mapping[str, Make]], head: Make, cut: str) -> CutNetwork:
    """Returns a chain cut into one block per stage or per block.

    Args:
        stem: makes what comes before the first block.
        stages: for each stage its blocks by name.
        head: makes what comes after the last block.
        cut: 'stage' or 'block'.

    Raises:
        ValueError: for another cut.
    """
    if cut not in CUTS:
        raise ValueError(f'cut={cut!r}: it must be one of {", ".join(CUTS)}.')
    named = [(name, make) for stage in stages for name, make in stage.items()]
    blocks = tuple(tuple(stage) for stage in stages) if cut == 'stage' else tuple((name,) for name, _ in named)
    return CutNetwork(Chain((('stem', stem), *named, ('head', head))), ('stem',), blocks, ('head',))


def stage_blocks(number: int, makes: Sequence[Make]) -> dict[str, Make]:
    """Returns the blocks of stage `number`, counted from 1, by their names 'stage1_block1', ..."""
    return {f'stage{number}_block{position}': make for position, make in enumerate(makes, 1)}


def block_class(cls: type[nn.Module], remat: bool) -> Any:
    """Returns the class of a block, which recomputes its inside in the backward pass if `remat`, to save memory."""
    return nn.remat(cls, static_argnums=(2,)) if remat else cls


def compute_dtype(name: str) -> Any:
    """Returns the dtype called 'float32' or 'bfloat16'.

    Raises:
        ValueError: for another name.
    """
    if name not in DTYPES:
        raise ValueError(f'dtype={name!r}: it must be one of {", ".join(DTYPES)}.')
    return jnp.dtype(name)
