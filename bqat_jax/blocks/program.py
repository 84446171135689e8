"""A network as a program (a jaxpr) that is cut at marks into pieces that run separately.

The network is traced once, unchanged; a named identity marks the output of each block's end. The operations before a
mark, in program order, belong to the blocks up to it. A value is alive at a cut if it depends on the inputs, is an
input or computed before the cut, and is read after the cut or is an output. A cut thus carries everything that crosses
it: shortcuts, masks, lengths, skip connections of a UNet, carries.

Invariants:
- Running all pieces runs exactly the operations of the network.
- A piece reads the values alive at its cut, and values that depend on variables and random keys only. Every piece that
  reads the latter recomputes them from its variables.
- The values alive at a cut have one order in training and evaluation, in low and full precision; `check_alike` checks
  their shapes and dtypes. Every module therefore marks its output, so that a dropout without effect still makes a new
  value.

A mark inside `nn.remat`, `nn.jit` or the like is in an inner program. If no operation follows the mark there, the cut
is after the inner program. Otherwise the inner program is inlined in the outer one, and `nn.remat` does not recompute
it. A cut between iterations of `nn.scan` divides the scan in two, over slices of the stack.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  # JAX 0.12: Jaxpr, renamed
    Jaxpr,
    Literal,
    Var,
    jaxpr_as_fun,
    jaxprs_in_params,
)

from bqat_jax.interception import intercept_methods
from bqat_jax.jaxprs import consts_of, run_operation, scan_arguments

MARK = 'bqat_jax:'
# Methods that compute nothing; Flax itself calls '<lambda>'.
SETUP = ('setup', '<lambda>')
# Operations whose inner programs can be inlined.
CALLS = ('jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'checkpoint', 'remat')
Targets = Mapping[str, list[int | None]]
_INDEXED = re.compile(r'(.*)\[(\d+)\]')


def parse_end(end: str) -> tuple[str, int | None]:
    """Returns (path, iteration) of an end such as 'encoder/layers[3]'; the iteration of 'encoder/layer3' is None."""
    match = _INDEXED.fullmatch(end)
    return (match[1], int(match[2])) if match else (end, None)


def mark(value: Any, path: str, call: int = 0) -> Any:
    """Returns a tree of arrays marked as the output of call number `call` of the submodule at `path`."""

    def name(x):
        return checkpoint_name(x, f'{MARK}{path}#{call}') if isinstance(x, jax.Array) else x

    return jax.tree.map(name, value)


def mark_modules(root: Any) -> contextlib.AbstractContextManager:
    """Returns a context in which every submodule of the bound module `root` marks its output."""
    depth, calls, running = len(root.path), itertools.count(), []

    def interceptor(call, args, kwargs, context):
        path = '/'.join(context.module.path[depth:])
        if not path or path in running or context.method_name in SETUP:  # Methods of a module may call each other.
            return call(*args, **kwargs)
        running.append(path)
        try:
            return mark(call(*args, **kwargs), path, next(calls))
        finally:
            running.pop()

    return intercept_methods(interceptor)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A cut through a program.

    Attributes:
        position: number of operations before the cut.
        value: the output of the block's end.
        alive: the values carried over the cut.
    """

    position: int
    value: tuple[Var, ...]
    alive: tuple[Var, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced network, `run(variables, inputs) -> outputs, state`, cut after the ends of its blocks.

    Attributes:
        program: maps flat variables and inputs to flat outputs and state.
        variables: number of arguments that are variables and random keys.
        outputs: number of results that are outputs.
        structure: tree structure of (outputs, state).
        cuts: one cut per end.
    """

    program: ClosedJaxpr
    variables: int
    outputs: int
    structure: Any
    cuts: tuple[Cut, ...]

    def run(self, variables: Any, inputs: Any) -> tuple[Any, list[Any], list[tuple[Any, ...]], Any]:
        """Returns (outputs, outputs of the blocks' ends, values alive at every cut, state)."""
        jaxpr = self.program.jaxpr
        groups = [jaxpr.outvars, *(cut.value for cut in self.cuts), *(cut.alive for cut in self.cuts)]
        results = iter(
            self._evaluate(jaxpr.invars, [x for group in groups for x in group], jaxpr.eqns, (variables, inputs))
        )
        own, *rest = [tuple(next(results) for _ in group) for group in groups]
        outputs, state = jax.tree.unflatten(self.structure, own)
        values, alive = rest[: len(self.cuts)], rest[len(self.cuts) :]
        return outputs, [value[0] if len(value) == 1 else value for value in values], alive, state

    def run_piece(self, first: int, last: int, variables: Any, alive: Sequence[Any]) -> Any:
        """Runs pieces `first` to `last`; there is one more piece than there are cuts.

        Args:
            first: index of the first piece, above 0.
            last: index of the last piece.
            variables: variables with the structure of the traced ones.
            alive: values alive at the cut before the first piece.

        Returns:
            The values alive at the cut after the last piece, a tuple; the outputs if no cut follows it.
        """
        jaxpr, ends = self.program.jaxpr, last == len(self.cuts)
        own, known = jaxpr.invars[: self.variables], self.cuts[first - 1].alive
        wanted = jaxpr.outvars[: self.outputs] if ends else self.cuts[last].alive
        operations = _operations_for(jaxpr, known, wanted)
        results = self._evaluate([*own, *known], wanted, operations, (variables, list(alive)))
        return jax.tree.unflatten(jax.tree.structure(self._outputs), results) if ends else tuple(results)

    def crossing_shapes(self) -> list[list[tuple[tuple[int, ...], Any]]]:
        """Returns shapes and dtypes of the values alive at every cut, and of the outputs."""
        avals: list[list[Any]] = [[x.aval for x in crossing] for crossing in self._crossings]
        return [[(aval.shape, aval.dtype) for aval in crossing] for crossing in avals]

    def are_shared(self) -> list[list[bool]]:
        """Returns for the values of `crossing_shapes` whether they depend on inputs only, not on variables."""
        jaxpr = self.program.jaxpr
        on_variables = _depend_on(jaxpr, jaxpr.invars[: self.variables])
        return [[isinstance(x, Literal) or x not in on_variables for x in crossing] for crossing in self._crossings]

    def describe_state(self) -> dict[str, tuple[Any, bool]]:
        """Returns for every collection of the state (shape and dtype of every leaf, whether it is unchanged)."""
        jaxpr = self.program.jaxpr
        given = set(jaxpr.invars)
        _, state = jax.tree.unflatten(self.structure, jaxpr.outvars)

        def is_given(x):
            return not isinstance(x, Literal) and x in given

        return {
            name: (
                jax.tree.map(lambda x: (x.aval.shape, x.aval.dtype), tree),
                all(is_given(x) for x in jax.tree.leaves(tree)),
            )
            for name, tree in state.items()
        }

    def modules(self) -> list[set[str]]:
        """Returns for every piece the paths of the modules that run in it."""
        operations, cuts = self.program.jaxpr.eqns, [cut.position for cut in self.cuts]
        pieces = zip([0, *cuts], [*cuts, len(operations)], strict=True)
        return [_marked_paths(operations[start:stop]) for start, stop in pieces]

    @property
    def _crossings(self) -> list[Sequence[Any]]:
        outputs = [x for x in self.program.jaxpr.outvars[: self.outputs]]
        return [*(cut.alive for cut in self.cuts), outputs]

    @property
    def _outputs(self) -> Any:
        return jax.tree.unflatten(self.structure, self.program.jaxpr.outvars)[0]

    def _evaluate(self, given: Sequence[Var], wanted: Sequence[Any], operations: Sequence[Any], arguments: Any) -> Any:
        jaxpr = self.program.jaxpr
        names = jaxpr.debug_info.with_unknown_names()
        part = jaxpr.replace(invars=list(given), outvars=list(wanted), eqns=list(operations), debug_info=names)
        return jaxpr_as_fun(ClosedJaxpr(part, self.program.consts))(*jax.tree.leaves(arguments))


def trace(run: Callable[[Any, Any], tuple[Any, Any]], variables: Any, inputs: Any, ends: Sequence[str]) -> Program:
    """Returns the program of `run(variables, inputs) -> outputs, state`, cut after `ends`.

    Args:
        run: runs the network with its modules' outputs marked.
        variables: a tree of arrays or shapes.
        inputs: a tree of arrays or shapes.
        ends: paths of submodules in the order of their calls, optionally with an iteration: 'layers[3]'.

    Raises:
        ValueError: for an end that is never reached or where a cut is impossible.
    """
    program, shapes = jax.make_jaxpr(run, return_shape=True)(variables, inputs)
    structure = jax.tree.structure(shapes)
    targets = _targets(ends)
    if any(_marks_inside(operation, targets) for operation in program.jaxpr.eqns):
        inner = program

        def flat(*arguments):
            return _write_out(inner.jaxpr, inner.consts, arguments, targets)

        program = jax.make_jaxpr(flat)(*program.in_avals)
    outputs, count = len(jax.tree.leaves(shapes[0])), len(jax.tree.leaves(variables))
    return Program(program, count, outputs, structure, _find_cuts(program.jaxpr, count, outputs, ends))


def _targets(ends: Sequence[str]) -> dict[str, list[int | None]]:
    """Returns for the path of every end the iterations after which to cut; None means after all of them."""
    targets: dict[str, list[int | None]] = {}
    for end in ends:
        path, index = parse_end(end)
        targets.setdefault(path, []).append(index)
    return targets


def _mark_of(operation: Any) -> str | None:
    """Returns 'path#call' if an operation is a mark, else None."""
    name = operation.params['name'] if operation.primitive.name == 'name' else ''
    return name.removeprefix(MARK) if name.startswith(MARK) else None


def _path_of(operation: Any) -> str | None:
    marked = _mark_of(operation)
    return None if marked is None else marked.rpartition('#')[0]


def _marks_inside(operation: Any, targets: Targets) -> set[str]:
    """Returns the paths among `targets` that are marked within an operation's inner programs."""
    inner = [_marked_paths(program.eqns) for program in jaxprs_in_params(operation.params)]
    return set().union(*inner) & set(targets)


def _marked_paths(operations: Sequence[Any]) -> set[str]:
    """Returns the paths that are marked in operations and in their inner programs."""
    paths = {path for path in map(_path_of, operations) if path is not None}
    return paths.union(*(_marked_paths(inner.eqns) for x in operations for inner in jaxprs_in_params(x.params)))


def _ends_with(program: Jaxpr, path: str) -> dict[int, str]:
    """Returns the marks of `path` by index of the marked result; {} if an operation follows a mark."""
    marks: dict[Var, str] = {}
    for operation in program.eqns:
        read = [x for x in operation.invars if not isinstance(x, Literal) and x in marks]
        if _path_of(operation) == path:
            marks[operation.outvars[0]] = operation.params['name']
        elif _mark_of(operation) is not None and read:  # The mark of an enclosing module.
            marks[operation.outvars[0]] = marks[read[0]]
        elif read:
            return {}
        elif operation.primitive.name in CALLS:
            (inner,) = jaxprs_in_params(operation.params)
            marks |= {operation.outvars[number]: name for number, name in _ends_with(inner, path).items()}
    return {number: marks[x] for number, x in enumerate(program.outvars) if not isinstance(x, Literal) and x in marks}


def _write_out(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], targets: Targets) -> Any:
    """Evaluates a program with all cuts moved to its top level."""
    values: dict[Var, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for operation in jaxpr.eqns:
        given, inside = [read(x) for x in operation.invars], _marks_inside(operation, targets)
        if not inside:
            results = run_operation(jaxpr, operation, given)
        elif operation.primitive.name in CALLS:
            results = _write_out_call(jaxpr, operation, given, targets)
        elif operation.primitive.name == 'scan':
            results = _divide_scan(operation, given, targets)
        else:
            raise ValueError(
                f'The cut after {sorted(inside)[0]!r} is within {operation.primitive.name!r}, which cannot be cut. Cut '
                'after the module that contains it.'
            )
        values |= dict(zip(operation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _write_out_call(jaxpr: Jaxpr, operation: Any, given: list[Any], targets: Targets) -> list[Any]:
    """Runs an inner program unchanged, with its mark moved after it, if it ends with the mark; otherwise inlines it."""
    (inner,), inside = jaxprs_in_params(operation.params), _marks_inside(operation, targets)
    path = min(inside)
    marks = _ends_with(inner, path) if len(inside) == 1 and targets[path] == [None] * len(targets[path]) else {}
    if marks:
        results = run_operation(jaxpr, operation, given)
        return [checkpoint_name(x, marks[number]) if number in marks else x for number, x in enumerate(results)]
    return _write_out(inner, consts_of(operation), given, targets)


def _divide_scan(operation: Any, given: list[Any], targets: Targets) -> list[Any]:
    """Runs a scan in parts, one per cut, with the marks after the parts."""
    (inner,), length = jaxprs_in_params(operation.params), operation.params['length']
    inside = _marks_inside(operation, targets)
    path = min(inside, key=len)
    marks = _ends_with(inner, path)
    deeper = sorted(inside - {path})
    if deeper or not marks:
        raise ValueError(
            f'The cut after {(deeper or [path])[0]!r} is within an iteration of nn.scan. Cut after the scanned module, '
            "or between its iterations: 'layers[3]' cuts after the fourth iteration of 'layers'."
        )
    names = {length - 1 if n is None else n: path if n is None else f'{path}[{n}]' for n in targets[path]}
    if max(names) >= length or (operation.params['reverse'] and set(names) != {length - 1}):
        why = f'has the iterations 0 to {length - 1}' if max(names) >= length else 'runs backwards'
        raise ValueError(f'The cut after {path}[{max(names)}]: this nn.scan {why}.')
    constant, carry, stacked = scan_arguments(operation, given)
    carries = len(carry)
    carried, call = [number for number in marks if number < carries], next(iter(marks.values())).rpartition('#')[2]

    def body(carry, own):
        results = jaxpr_as_fun(operation.params['jaxpr'])(*constant, *carry, *own)
        return results[:carries], results[carries:]

    reverse, unroll = (operation.params[key] for key in ('reverse', 'unroll'))
    parts: list[Any] = []
    start = 0
    for stop in sorted({*(index + 1 for index in names), length}):
        own = [jax.lax.slice_in_dim(x, start, stop) if stop - start < length else x for x in stacked]
        size = stop - start
        carry, gathered = jax.lax.scan(body, carry, own, length=size, reverse=reverse, unroll=min(unroll, size))
        if stop - 1 in names:
            name = f'{MARK}{names[stop - 1]}#{call}'
            marked = set(carried or range(len(given)))
            results = [
                checkpoint_name(x, name) if number in marked else x for number, x in enumerate([*carry, *gathered])
            ]
            carry, gathered = results[:carries], results[carries:]
        parts.append(gathered)
        start = stop
    gathered = [jax.lax.concatenate(part, 0) for part in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]
    return [*carry, *gathered]


def _find_cuts(jaxpr: Jaxpr, variables: int, outputs: int, ends: Sequence[str]) -> tuple[Cut, ...]:
    """Returns a cut at the mark of every end, in order, with the values alive there."""
    groups: list[Any] = []  # (path, positions of the mark's operations) of every call
    numbers: dict[str, int] = {}
    for position, operation in enumerate(jaxpr.eqns):
        name = _mark_of(operation)
        if name is not None:
            if name not in numbers:
                numbers[name] = len(groups)
                groups.append((name.rpartition('#')[0], []))
            groups[numbers[name]][1].append(position)
    order = sorted(groups, key=lambda group: group[1][-1])
    marks, start = [], 0
    for number, end in enumerate(ends):
        start = next((n + 1 for n in range(start, len(order)) if order[n][0] == end), 0)
        if not start:
            previous = 'the input' if number == 0 else repr(ends[number - 1])
            paths = list(dict.fromkeys(path for path, _ in order))
            raise ValueError(
                f'The cut after {end!r} is never reached: no submodule of that path returns an array after {previous}. '
                f'In the order of their calls these do: {", ".join(paths) or "none"}.'
            )
        marks.append(order[start - 1][1])
    depends = _depend_on(jaxpr, jaxpr.invars[variables:])
    last_read = _last_reads(jaxpr, outputs)
    made = {var: -1 for var in jaxpr.invars[variables:]}
    made |= {var: position for position, operation in enumerate(jaxpr.eqns) for var in operation.outvars}
    cuts = []
    for positions in marks:
        cut = positions[-1] + 1
        alive = [x for x, position in made.items() if position < cut <= last_read.get(x, -1) and x in depends]
        cuts.append(Cut(cut, tuple(jaxpr.eqns[position].outvars[0] for position in positions), tuple(alive)))
    return tuple(cuts)


def _depend_on(jaxpr: Jaxpr, sources: Sequence[Var]) -> set[Var]:
    """Returns the values that depend on any of the arguments `sources`."""
    depends = set(sources)
    for operation in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in depends for x in operation.invars):
            depends |= set(operation.outvars)
    return depends


def _last_reads(jaxpr: Jaxpr, outputs: int) -> dict[Var, int]:
    """Returns the position of the last operation that reads each value for the outputs; for outputs, past the end."""
    last = {x: len(jaxpr.eqns) for x in jaxpr.outvars[:outputs] if not isinstance(x, Literal)}
    for position in reversed(range(len(jaxpr.eqns))):
        operation = jaxpr.eqns[position]
        if any(x in last for x in operation.outvars):
            for x in operation.invars:
                if not isinstance(x, Literal):
                    last.setdefault(x, position)
    return last


def _operations_for(jaxpr: Jaxpr, known: Sequence[Var], wanted: Sequence[Any]) -> list[Any]:
    """Returns the operations that compute `wanted` from the values `known` and from variables."""
    given, needed, kept = set(known), {x for x in wanted if not isinstance(x, Literal)}, []
    for operation in reversed(jaxpr.eqns):
        if any(x in needed and x not in given for x in operation.outvars):
            kept.append(operation)
            needed |= {x for x in operation.invars if not isinstance(x, Literal)}
    return kept[::-1]
