"""Converts a JAX function to an ONNX model: a rule translates each operation of its jaxpr.

Operations on constants are folded, except arithmetic with codes, which stay small in the file. Inner programs are
inlined, and loops are unrolled. Operations that no output depends on are omitted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import Jaxpr, Literal, Var, jaxprs_in_params

from bqat_jax.export import onnx_contractions, onnx_indexing, onnx_operations, onnx_shapes
from bqat_jax.export.onnx_graph import Graph
from bqat_jax.export.onnx_model import OnnxOptions
from bqat_jax.export.onnx_operations import Rule, refuse
from bqat_jax.export.onnx_qcdq import NAMED
from bqat_jax.export.onnx_values import Constant, Tensor, Value, broadcast_shape, is_codes, is_small, is_static
from bqat_jax.jaxprs import consts_of, scan_arguments

RULES: dict[str, Rule] = {
    **onnx_operations.RULES,
    **onnx_shapes.VIEWS,
    **onnx_shapes.RULES,
    **onnx_contractions.RULES,
    **onnx_indexing.RULES,
}
CALLS = (
    *('jit', 'pjit', 'closed_call', 'core_call', 'remat2', 'checkpoint', 'remat'),
    *('custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr', 'custom_vmap_call'),
)


def build_model(
    run: Callable[[Any, Any], Any], arrays: Any, inputs: Any, options: OnnxOptions | None = None
) -> onnx.ModelProto:
    """Returns the ONNX model of `run(arrays, inputs)`.

    Its inputs are called 'input' or, for a tree, 'input_<path>', its outputs 'output' or 'output_<path>', and a
    symbolic batch size 'batch'.

    Args:
        run: a JAX function.
        arrays: a tree of NumPy arrays, constants of the model. Integers of 8 bits are stored in the fewest bits.
        inputs: a tree of `jax.ShapeDtypeStruct`s; an axis may have the size `jax.export.symbolic_shape('b')[0]`.
        options: options of the model; the defaults if None.

    Raises:
        ValueError: for an operation without a rule.
    """
    program, shapes = jax.make_jaxpr(run, return_shape=True)(_shapes_of(arrays), inputs)
    given = [Tensor(name, x.shape, np.dtype(x.dtype)) for name, x in _named_leaves(inputs, 'input')]
    constants = [Constant(np.asarray(x), is_codes(np.asarray(x))) for x in jax.tree.leaves(arrays)]
    graph = Graph(options or OnnxOptions(), given)
    jaxpr = program.jaxpr
    results = _Walk(graph, ()).run(jaxpr, program.consts, [*constants, *given], [True] * len(jaxpr.outvars))
    names = [name for name, _ in _named_leaves(shapes, 'output')]
    full = [graph.expand(x, own.shape) for x, own in zip(results, jax.tree.leaves(shapes), strict=True)]
    return graph.model(list(zip(names, full, strict=True)))


def _shapes_of(arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), arrays)


def _named_leaves(tree: Any, name: str) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator='_') for path, _ in leaves]
    return [(f'{name}_{path}' if path else name, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Writes programs into a graph.

    Attributes:
        graph: the graph under construction.
        stack: names of the enclosing programs.
    """

    graph: Graph
    stack: tuple[str, ...]

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Value], needed: Sequence[bool]) -> list[Any]:
        """Returns a program's results; None for one that is not needed."""
        values: dict[Var, Value] = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        values |= dict(zip(jaxpr.invars, operands, strict=True))
        wanted = [x for x, is_needed in zip(jaxpr.outvars, needed, strict=True) if is_needed]

        def read(x: Any) -> Any:
            return _constant(x.val, x.aval) if isinstance(x, Literal) else values.get(x)

        for equation, kept in self._alive(jaxpr, wanted):
            results = self._write(equation, [read(x) for x in equation.invars], kept)
            values |= {x: value for x, value in zip(equation.outvars, results, strict=True) if value is not None}
        return [read(x) if is_needed else None for x, is_needed in zip(jaxpr.outvars, needed, strict=True)]

    def _alive(self, jaxpr: Jaxpr, wanted: Sequence[Any]) -> list[tuple[Any, list[bool]]]:
        """The equations that `wanted` depends on, in order, each with flags for its needed results."""
        needed, alive = {x for x in wanted if not isinstance(x, Literal)}, []
        for equation in reversed(jaxpr.eqns):
            kept = [x in needed for x in equation.outvars]
            if any(kept) or self._observes(equation):
                alive.append((equation, kept))
                read = [x for x, is_read in zip(equation.invars, self._reads(equation, kept), strict=True) if is_read]
                needed |= {x for x in read if not isinstance(x, Literal)}
        return alive[::-1]

    def _reads(self, equation: Any, kept: list[bool]) -> list[bool]:
        """Flags for the operands that an equation reads for its kept results; a loop reads what its body reads."""
        if equation.primitive.name != 'scan':
            return [True] * len(equation.invars)
        (inner,) = jaxprs_in_params(equation.params)
        constant, carry, _ = scan_arguments(equation, equation.invars)
        carries = range(len(constant), len(constant) + len(carry))
        wanted = [x for number, x in enumerate(inner.outvars) if number < len(carry) or kept[number]]
        read = {x for x in wanted if not isinstance(x, Literal)}
        for own, _ in self._alive(inner, wanted):
            read |= {x for x in own.invars if not isinstance(x, Literal)}
        return [number in carries or x in read for number, x in enumerate(inner.invars)]

    def _observes(self, equation: Any) -> bool:
        if equation.primitive.name == 'name':
            return self.graph.is_observed(equation.params['name'])
        return any(self._observes(own) for inner in jaxprs_in_params(equation.params) for own in inner.eqns)

    def _write(self, equation: Any, operands: list[Value], needed: list[bool]) -> Sequence[Any]:
        name, graph = equation.primitive.name, self.graph
        path = [part for part in (*self.stack, str(equation.source_info.name_stack)) if part]
        graph.place = f' (in {"/".join(path)})' if path else ''
        inner = dataclasses.replace(self, stack=tuple(path))
        if name in CALLS:
            rule = NAMED.get(equation.params.get('name', ''))
            results = rule(graph, equation, operands) if rule else None
            return inner._call(equation, operands, needed) if results is None else results
        if name == 'scan':
            return inner._scan(equation, operands, needed)
        if name == 'cond':
            return inner._conditional(equation, operands, needed)
        if name == 'optimization_barrier':
            return operands
        if name == 'name':
            if graph.is_observed(equation.params['name']):
                graph.observe(equation.params['name'], graph.expand(operands[0], equation.outvars[0].aval.shape))
            return operands
        folded = None if name in onnx_shapes.VIEWS else _fold(equation, operands)
        if folded is not None:
            return folded
        if name not in RULES:
            raise refuse(graph, equation, '')
        return RULES[name](graph, equation, operands)

    def _call(self, equation: Any, operands: list[Value], needed: list[bool]) -> list[Any]:
        inner = next(iter(jaxprs_in_params(equation.params)))
        return self.run(inner, consts_of(equation), operands, needed)

    def _conditional(self, equation: Any, operands: list[Value], needed: list[bool]) -> list[Any]:
        index, *given = operands
        if not isinstance(index, Constant):
            raise refuse(self.graph, equation, 'whose branch depends on the inputs')
        branches = equation.params['branches']
        branch = branches[min(max(int(index.array), 0), len(branches) - 1)]
        return self.run(branch.jaxpr, branch.consts, given, needed)

    def _scan(self, equation: Any, operands: list[Value], needed: list[bool]) -> list[Any]:
        """An unrolled loop; arrays that are stacked along its iterations are sliced."""
        (inner,) = jaxprs_in_params(equation.params)
        constant, carry, stacked = scan_arguments(equation, operands)
        carries = len(carry)
        length, gathered = equation.params['length'], {}
        kept = [True] * carries + needed[carries:]
        for step in reversed(range(length)) if equation.params['reverse'] else range(length):
            own = [self._slice(x, step) for x in stacked]
            walk = dataclasses.replace(self, stack=(*self.stack, str(step)))
            results = walk.run(inner, consts_of(equation), [*constant, *carry, *own], kept)
            carry, gathered[step] = results[:carries], results[carries:]
        own_results: Any = inner.outvars[carries:]
        shapes = [x.aval.shape for x in own_results]
        stacks = [
            self._stack([gathered[step][n] for step in range(length)], shape) if kept[carries + n] else None
            for n, shape in enumerate(shapes)
        ]
        return [*carry, *stacks]

    def _slice(self, value: Value, step: int) -> Value:
        if value is None:
            return value
        starts, stops = [0] * len(value.shape), list(value.shape)
        if value.shape[0] != 1:
            starts[0], stops[0] = step, step + 1
        part = self.graph.slice(value, starts, stops, [1] * len(stops))
        return self.graph.reshape(part, value.shape[1:])

    def _stack(self, values: list[Value], shape: tuple[Any, ...]) -> Value:
        """Stacks the results of all iterations along a new first axis."""
        if all(isinstance(x, Constant) for x in values) and is_static(shape):
            arrays = [np.broadcast_to(x.array, shape) for x in values]  # pyright: ignore[reportAttributeAccessIssue]
            return Constant(np.stack(arrays), all(x.codes for x in values))  # pyright: ignore[reportAttributeAccessIssue]
        rows = [self.graph.reshape(self.graph.expand(x, shape), (1, *shape)) for x in values]
        return self.graph.add('Concat', rows, (len(rows), *shape), rows[0].dtype, axis=0)


def _constant(array: Any, aval: Any = None) -> Constant:
    return Constant(np.asarray(array) if aval is None else np.asarray(array, aval.dtype))


def _fold(equation: Any, operands: list[Value]) -> list[Value] | None:
    """An operation's results if its operands are constants other than codes; None if it belongs in the graph."""
    arrays = [x.array for x in operands if isinstance(x, Constant) and not x.codes]
    if len(arrays) < len(operands) or equation.effects or not arrays:
        return None
    if equation.primitive.name in onnx_operations.RULES:
        # In the constants' shapes, which may have ones for larger sizes.
        made = [broadcast_shape(*(x.shape for x in arrays))]
        given = [np.broadcast_to(x, made[0]) for x in arrays]
    else:
        made, shapes = ([x.aval.shape for x in group] for group in (equation.outvars, equation.invars))
        if not all(map(is_static, shapes)):
            return None
        given = [np.broadcast_to(x, shape) for x, shape in zip(arrays, shapes, strict=True)]
    largest = max(x.size for x in arrays)
    if not all(is_small(shape, largest) for shape in made):
        return None
    results = equation.primitive.bind(*map(jax.numpy.asarray, given), **equation.params)
    return [Constant(np.asarray(x)) for x in (results if equation.primitive.multiple_results else [results])]
