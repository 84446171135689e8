"""The network interface of block replacement: a Linen module, its inputs, and where its blocks end."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from bqat_jax.blocks.program import Program, mark_modules, trace
from bqat_jax.blocks.switch import Call, switch_module

# Collections of `sow` and `perturb`, whose values are not carried from step to step.
PASSING = ('intermediates', 'perturbations')
PARAMS, BATCH_STATS, DROPOUT = 'params', 'batch_stats', 'dropout'
Within = Callable[[], contextlib.AbstractContextManager]


class Crossing(NamedTuple):
    """A value that is alive at a cut, or an output.

    Attributes:
        shape: the shape for a batch of one.
        dtype: the dtype.
        axis: the batch axis; None if there is none.
        is_shared: whether the value depends on the inputs only and not on variables, such as a mask.
    """

    shape: tuple[int, ...]
    dtype: Any
    axis: int | None
    is_shared: bool

    def shape_of(self, size: int) -> tuple[int, ...]:
        """Returns the shape for a batch of `size` examples."""
        return tuple(n * size if axis == self.axis else n for axis, n in enumerate(self.shape))

    @property
    def can_merge(self) -> bool:
        """Whether the values of several batches can be merged, or are equal."""
        return self.is_shared if self.axis is None else self.shape[self.axis] == 1


class Run(NamedTuple):
    """The results of a run of the network.

    Attributes:
        outputs: a tree.
        features: for every block, the output of its last submodule: an array or a tuple of arrays.
        alive: for every cut, the values carried over it, a tuple of arrays.
        state: the collections that training changes.
    """

    outputs: Any
    features: list[Any]
    alive: list[tuple[Any, ...]]
    state: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BlockNetwork:
    """A network whose blocks run one after another; each block starts where the previous one ends.

    Attributes:
        module: the Linen module.
        blocks: paths of the submodules after which the network is cut, in the order of their calls, optionally with an
            iteration of an `nn.scan`, 'layers[3]'. The first block starts at the input; the head follows the last.
        call: `call(module, inputs, train)` runs the bound module.
        inputs: shapes and dtypes of one example, a tree of `jax.ShapeDtypeStruct`; None before `with_inputs`.
        crossings: the values alive at every cut, followed by the outputs.
        streams: names of the random streams that the module asks for in training.
        mutable: collections that training changes, without the parameters.
    """

    module: nn.Module
    blocks: tuple[str, ...]
    call: Call
    inputs: Any = None
    crossings: tuple[tuple[Crossing, ...], ...] = ()
    streams: tuple[str, ...] = (DROPOUT,)
    mutable: tuple[str, ...] = (BATCH_STATS,)

    def __post_init__(self):
        if len(self.blocks) < 2:
            raise ValueError(f'The network has {len(self.blocks)} blocks: block replacement needs at least two.')

    def batch_of(self, size: int) -> Any:
        """Returns shapes and dtypes of a batch of `size` inputs.

        Raises:
            ValueError: before `with_inputs`.
        """
        if self.inputs is None:
            raise ValueError('The inputs of the network are not known yet. Use with_inputs(network, shapes).')
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), self.inputs)

    def init(self, key: jax.Array, inputs: Any = None) -> dict[str, Any]:
        """Returns initial variables by collection, 'params', 'batch_stats' and others.

        Metadata boxes of parameters (`nn.with_partitioning`) are removed; see `init_boxed`.

        Args:
            key: random key.
            inputs: inputs as in `with_inputs`; by default those of the network.

        Raises:
            ValueError: if variables depend on values of inputs.
        """
        return nn.meta.unbox(self.init_boxed(key, inputs))

    def init_boxed(self, key: jax.Array, inputs: Any = None) -> dict[str, Any]:
        """Returns the variables of `init` with their metadata boxes; arguments as `init`."""
        network = self if inputs is None else dataclasses.replace(self, inputs=describe_inputs(inputs))
        if network._reads_inputs():
            raise ValueError(
                'The network makes variables out of its inputs, and only their shapes are known here. Use the '
                'variables that module.init(key, a batch) returns.'
            )
        return network._start(switch_module(self.module, False).lazy_init, key, network.batch_of(1))

    def _reads_inputs(self) -> bool:
        """Returns whether initial variables depend on values of inputs, which Flax 0.12.12 would replace by zeros."""
        init, batch = switch_module(self.module, False).init, self.batch_of(1)
        program = jax.make_jaxpr(lambda x: self._start(init, jax.random.key(0), x))(batch).jaxpr
        read, printed = (dce_jaxpr(program, [used] * len(program.outvars))[1] for used in (True, False))
        # Inputs that are read even if no variable is wanted only go to a jax.debug.print.
        return any(r and not p for r, p in zip(read, printed, strict=True))

    def shapes(self) -> dict[str, Any]:
        """Returns shapes and dtypes of the variables by collection; nothing is computed."""
        init = switch_module(self.module, False).init
        return nn.meta.unbox(jax.eval_shape(lambda x: self._start(init, jax.random.key(0), x), self.batch_of(1)))

    def _start(self, init: Callable[..., Any], key: jax.Array, inputs: Any) -> dict[str, Any]:
        variables = init(key, inputs, method=lambda module, x: self.call(module, x, False))
        kept = {name: tree for name, tree in variables.items() if name not in PASSING}
        return {PARAMS: {}, BATCH_STATS: {}, **kept}

    def apply(
        self,
        variables: Any,
        inputs: Any,
        *,
        train: bool,
        key: jax.Array | None = None,
        around: Callable[[Any], contextlib.AbstractContextManager] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Runs the network.

        Args:
            variables: variables by collection.
            inputs: a batch.
            train: True for batch statistics and dropout, False for evaluation.
            key: key of the random streams; if None, a network that draws in evaluation uses a fixed key.
            around: `around(module)` is a context in which the bound module is called.

        Returns:
            The outputs, and the updated collections that training changes.
        """
        state = {name: variables.get(name, {}) for name in self.mutable}
        if key is None and not train:
            key = jax.random.key(0)

        def run(module, inputs):
            with contextlib.nullcontext() if around is None else around(module):
                return self.call(module, inputs, train)

        outputs, updated = switch_module(self.module, train).apply(
            variables,
            inputs,
            method=run,
            mutable=list(self.mutable) if train else [],
            rngs=None if key is None else stream_keys(key, self.streams),
        )
        return outputs, {**state, **{name: tree for name, tree in updated.items() if name in state}}

    def as_function(
        self, variables: Any, *, train: bool, key: jax.Array | None = None
    ) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Returns `run(params, inputs)`, which runs the network with `params`; arguments and results as `apply`."""

        def run(params, inputs):
            return self.apply({BATCH_STATS: {}, **variables, PARAMS: params}, inputs, train=train, key=key)

        return run

    def trace(self, variables: Any, key: Any, *, train: bool, size: int) -> Program:
        """Returns the network's program for a batch of `size` examples; arguments as `apply`, arrays or shapes."""

        def run(arguments, inputs):
            return self.apply(arguments[0], inputs, train=train, key=arguments[1], around=mark_modules)

        return trace(run, (variables, key), self.batch_of(size), self.blocks)

    def bind(
        self, variables: Any, *, train: bool, key: jax.Array | None = None, within: Within = contextlib.nullcontext
    ) -> 'BoundNetwork':
        """Returns the network with its variables, to run it completely or block by block.

        Args:
            variables: variables by collection.
            train: see `apply`.
            key: see `apply`.
            within: `within()` is a context in which the network is traced.

        Raises:
            ValueError: before `with_inputs`.
        """
        self.batch_of(1)
        return BoundNetwork(self, variables, train, key, within)

    def batch_size(self, cut: int, alive: Sequence[Any]) -> int:
        """Returns the number of examples in the values alive at cut number `cut`."""
        for crossing, x in zip(self.crossings[cut], alive, strict=True):
            if crossing.axis is not None:
                return x.shape[crossing.axis] // crossing.shape[crossing.axis]
        return 1


@dataclasses.dataclass(frozen=True)
class BoundNetwork:
    """A network with its variables; it is traced once per batch size, on the first run."""

    network: BlockNetwork
    variables: Any
    train: bool
    key: jax.Array | None
    within: Within = contextlib.nullcontext
    programs: dict[int, Program] = dataclasses.field(default_factory=dict)

    def run(self, inputs: Any) -> Run:
        """Runs the network on a batch.

        Raises:
            ValueError: if the shape or dtype of the inputs is not that of the network's inputs.
        """
        inputs = jax.tree.map(jnp.asarray, inputs)
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
        if own != self.network.inputs:
            raise ValueError(
                f'The network was made for inputs like {short(self.network.inputs)}, and these are like {short(own)} '
                '(shapes without the batch axis).'
            )
        size = jax.tree.leaves(inputs)[0].shape[0]
        return Run(*self._program(size).run((self.variables, self.key), inputs))

    def run_pieces(self, first: int, last: int, alive: Sequence[Any]) -> Any:
        """Runs blocks `first` to `last`; indices start at 0, and the head follows the last block.

        The collections that training changes are not updated.

        Args:
            first: index of the first block, above 0.
            last: index of the last block.
            alive: values alive at the cut before the first block.

        Returns:
            The values alive at the cut after the last block, a tuple of arrays; the outputs if it is the head.
        """
        program = self._program(self.network.batch_size(first - 1, alive))
        return program.run_piece(first, last, (self.variables, self.key), alive)

    def _program(self, size: int) -> Program:
        if size not in self.programs:
            with self.within():
                program = self.network.trace(self.variables, self.key, train=self.train, size=size)
            check_alike(self.network, program, size, 'in training' if self.train else 'in evaluation')
            self.programs[size] = program
        return self.programs[size]


def check_alike(network: BlockNetwork, program: Program, size: int, when: str) -> None:
    """Checks that the cuts of a program carry arrays of the shapes and dtypes of the network's cuts.

    Raises:
        ValueError: if shapes or dtypes differ.
    """
    names = (*(f'the cut after {block!r}' for block in network.blocks), 'the outputs')
    for name, crossings, own in zip(names, network.crossings, program.crossing_shapes(), strict=True):
        known = [(crossing.shape_of(size), jnp.dtype(crossing.dtype)) for crossing in crossings]
        if known != own:
            raise ValueError(
                f'At {name} the network carries {_listed(known)} by itself in evaluation, and {when} {_listed(own)}: '
                'blocks could not replace each other. Cut elsewhere, or let a submodule return the values that differ.'
            )


def _listed(shapes: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    return ', '.join(f'{dtype}{list(shape)}' for shape, dtype in shapes) or 'nothing'


def other_collections(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all collections of a network's variables except 'params'; missing batch statistics are {}."""
    return {BATCH_STATS: {}, **{name: tree for name, tree in variables.items() if name != PARAMS}}


def stream_keys(key: jax.Array, streams: Sequence[str]) -> dict[str, jax.Array]:
    """Returns a random key for each stream; dropout's is `key` itself."""
    return {name: key if name == DROPOUT else jax.random.fold_in(key, zlib.crc32(name.encode())) for name in streams}


def describe_inputs(inputs: Any) -> Any:
    """Returns shapes and dtypes of inputs as a tree of `jax.ShapeDtypeStruct`; a plain shape means float32."""
    if isinstance(inputs, Sequence) and all(isinstance(n, int | np.integer) for n in inputs):
        return jax.ShapeDtypeStruct(tuple(map(int, inputs)), jnp.float32)
    for x in jax.tree.leaves(inputs):
        if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
            raise ValueError(
                f'inputs={inputs!r}: must be a tree of jax.ShapeDtypeStruct(shape, dtype) or of arrays, for one '
                'example, or a plain shape for one float32 array.'
            )
    # JAX converts NumPy's float64 and int64 to float32 and int32.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(tuple(x.shape), jax.dtypes.canonicalize_dtype(x.dtype)), inputs)


def short(inputs: Any) -> str:
    """Returns shapes and dtypes of a tree as text."""
    if isinstance(inputs, Mapping):
        return '{' + ', '.join(f'{name!r}: {short(x)}' for name, x in inputs.items()) + '}'
    if isinstance(inputs, tuple | list):
        return f'({", ".join(short(x) for x in inputs)})'
    return f'{inputs.dtype}{list(inputs.shape)}' if hasattr(inputs, 'shape') else str(inputs)
