"""Cuts a user's own Linen module into blocks, without a change to it."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr

from bqat_jax.blocks.block_network import CARRIED, BlockNetwork

# What a module may call the argument that says whether it is trained, and what says the opposite.
TRAIN_ARGUMENTS = ('train', 'training', 'is_training')
EVALUATE_ARGUMENTS = ('deterministic', 'use_running_average', 'evaluate', 'eval')
HEAD = 'head'
OUTPUT = 'output'
Call = Callable[[Any, Any, bool], Any]


def split_into(module: nn.Module, stem: Call, blocks: Sequence[Call], head: Call) -> BlockNetwork:
    """Returns a module divided into pieces that are given as functions `piece(module, x, train)` of the bound module.

    Args:
        module: the module; one that makes its submodules in `setup`, so that functions can call them.
        stem: from images to what enters the first block.
        blocks: one function each; at least two.
        head: from what leaves the last block to logits.

    Raises:
        ValueError: for fewer than two blocks.
    """
    names = tuple(f'block{number}' for number in range(1, len(blocks) + 1))
    _check_count(names)
    pieces = {'stem': stem, **dict(zip(names, blocks, strict=True)), HEAD: head}

    def run(module, x, names, train):
        for name in names:
            x = pieces[name](module, x, train)
        return x

    return BlockNetwork(module, ('stem',), tuple((name,) for name in names), (HEAD,), run)


def split_after(
    module: nn.Module, ends: Sequence[str], image_shape: Sequence[int], call: Call | None = None
) -> BlockNetwork:
    """Returns a module divided after the submodules called `ends`.

    A block reaches from the end of the one before, or from the input, to the output of its submodule in `ends`; the
    head is what follows. It does not matter whether the submodules are made in `setup` or in a compact method, nor what
    stands between them. To run one piece, the module's own code is traced and the submodules of all others are passed
    over; what remains of them is arithmetic on zeros that nothing reads, which XLA takes out.

    Args:
        module: the module, called as `module(x)` or `module(x, train=...)`.
        ends: paths of the submodules in the order of their calls, such as 'layer1' or 'encoder/layer1'; one that is
            called more than once may stand there as often.
        image_shape: (height, width, channels), or whatever shape one example has.
        call: `call(module, x, train)` calls the bound module and returns its logits; by default the argument that says
            whether it is trained is found by its name.

    Raises:
        ValueError: if a submodule does not run, or something passes by a cut, as a shortcut does that begins in one
            block and ends in another; or for fewer than two ends.
    """
    ends = tuple(ends)
    _check_count(ends)
    pieces = _make_pieces(module, ends, tuple(image_shape), call or _find_call(module))
    pieces.check()
    return BlockNetwork(module, (), tuple((name,) for name in pieces.names[:-1]), (HEAD,), pieces.run)


def _check_count(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ValueError(f'There are {len(names)} blocks: block replacement needs at least two.')


def _find_call(module: nn.Module) -> Call:
    names = inspect.signature(type(module).__call__).parameters
    for name in TRAIN_ARGUMENTS:
        if name in names:
            return lambda module, x, train: module(x, **{name: train})
    for name in EVALUATE_ARGUMENTS:
        if name in names:
            return lambda module, x, train: module(x, **{name: not train})
    return lambda module, x, train: module(x)


def _make_pieces(module: nn.Module, ends: tuple[str, ...], image_shape: tuple[int, ...], call: Call) -> '_Pieces':
    pieces = _Pieces(module, ends, image_shape, call, {})

    def find(batch, train):
        outputs = []

        def run_unit(run, unit, piece, ends_piece):
            del unit, piece, ends_piece
            output = run()
            outputs.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), output))
            return output

        def run(module, images):
            with pieces.intercept(module, run_unit):
                return call(module, images, train)

        rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
        images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
        jax.eval_shape(lambda images: module.init(rngs, images, method=run), images)
        return outputs

    # How shapes grow with the batch is found here, once: `run` may stand inside somebody else's interception.
    units = {train: jax.tree.map(_Output, find(1, train), find(2, train)) for train in (False, True)}
    return dataclasses.replace(pieces, units=units)


class _Output(NamedTuple):
    """An output of a unit, for one and for two examples."""

    one: jax.ShapeDtypeStruct
    two: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Runs pieces of a module. A unit is a submodule that is called where none of its own parts ends a block."""

    module: nn.Module
    ends: tuple[str, ...]
    image_shape: tuple[int, ...]
    call: Call
    units: dict[bool, list[Any]]  # in training and not: the outputs of all units

    def run(self, module: Any, x: Any, names: Sequence[str], train: bool, standins: Any = None) -> Any:
        """Runs the consecutive pieces called `names`; the outputs of all others are `standins`, by default zeros."""
        first, last = self.names.index(names[0]), self.names.index(names[-1])
        if standins is None:
            standins = self.standins(jnp.shape(x)[0], train)
        images = x if first == 0 else jnp.zeros((jnp.shape(x)[0], *self.image_shape), jnp.float32)
        numbers = iter(range(len(standins)))

        def run_unit(run, unit, piece, ends_piece):
            number = next(numbers)
            output = run() if first <= piece <= last else standins[number]
            if ends_piece and piece == first - 1:
                output = x
            if ends_piece and piece == last:
                unit.put_variable(CARRIED, OUTPUT, output)
            return output

        with self.intercept(module, run_unit):
            logits = self.call(module, images, train)
        if last == len(self.ends):
            return logits
        # As a variable it comes out of `nn.remat` and `nn.jit` too.
        carried = module.variables[CARRIED]
        for name in self.ends[last].split('/'):
            carried = carried[name]
        return carried[OUTPUT]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the pieces."""
        return (*(f'block{number}' for number in range(1, len(self.ends) + 1)), HEAD)

    def standins(self, batch: int, train: bool) -> list[Any]:
        """Returns zeros in the shapes of the outputs of all units, in the order of their calls."""

        def zeros(unit):
            shape = [one + (batch - 1) * (two - one) for one, two in zip(unit.one.shape, unit.two.shape, strict=True)]
            return jnp.zeros(shape, unit.one.dtype)

        return jax.tree.map(zeros, self.units[train], is_leaf=lambda x: isinstance(x, _Output))

    def intercept(self, root: Any, run_unit: Callable[..., Any]):
        """Calls `run_unit(run, unit, piece, ends_piece)` for every unit that `root` calls."""
        depth, state = len(root.path), {'piece': 0, 'inside': False}

        def interceptor(call, args, kwargs, context):
            path = '/'.join(context.module.path[depth:])
            if state['inside'] or not path or context.method_name == 'setup':
                return call(*args, **kwargs)
            piece = state['piece']
            ends_piece = piece < len(self.ends) and path == self.ends[piece]
            if not ends_piece and any(end.startswith(f'{path}/') for end in self.ends):
                return call(*args, **kwargs)

            def run():
                state['inside'] = True
                try:
                    return call(*args, **kwargs)
                finally:
                    state['inside'] = False

            output = run_unit(run, context.module, piece, ends_piece)
            state['piece'] += ends_piece
            return output

        return nn.intercept_methods(interceptor)

    def check(self) -> None:
        """Raises ValueError if the module cannot be cut so."""
        paths = []

        def note(run, unit, piece, ends_piece):
            del unit
            paths.append(piece + ends_piece)
            return run()

        def look(module, images):
            with self.intercept(module, note):
                return self.call(module, images, False)

        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        variables: Any = jax.eval_shape(lambda images: self.module.init(jax.random.key(0), images, method=look), images)
        done = max(paths, default=0)
        if done < len(self.ends):
            raise ValueError(
                f'The cut behind {self.ends[done]!r} is never reached: no submodule of that path runs after '
                f'{"the input" if done == 0 else repr(self.ends[done - 1])}.'
            )
        standins, x = self.standins(1, False), images
        for name, end in zip(self.names, (*self.ends, 'the head'), strict=True):

            def run(variables, x, standins, name=name):
                return self.module.apply(
                    variables,
                    x,
                    method=lambda module, x: self.run(module, x, (name,), False, standins),
                    mutable=[CARRIED],
                )[0]

            program, shape = jax.make_jaxpr(run, return_shape=True)(variables, x, standins)
            _, is_read = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
            if any(is_read[len(jax.tree.leaves((variables, x))) :]):
                before = 'the input' if name == self.names[0] else 'the cut before it'
                raise ValueError(
                    f'The piece that ends with {end!r} reads something that passes by {before}, as a shortcut does '
                    'that begins in one block and ends in another: cut where everything goes through one array.'
                )
            x = shape
