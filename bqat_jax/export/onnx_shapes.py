"""ONNX rules for JAX operations on shapes, slices and reductions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bqat_jax.export.onnx_graph import Graph
from bqat_jax.export.onnx_operations import Rule, full, refuse, widen
from bqat_jax.export.onnx_values import Constant, Value


def _identity(graph, equation, operands):
    return list(operands)


def _broadcast_in_dim(graph, equation, operands):
    """The result has ones in place of repeated axes."""
    (x,), dimensions = operands[:1], equation.params['broadcast_dimensions']
    shape = [1] * len(equation.outvars[0].aval.shape)
    for axis, size in zip(dimensions, x.shape, strict=False):  # a scalar may represent any shape
        shape[axis] = size
    return [graph.reshape(x, shape)]


def _reshape(graph, equation, operands):
    if equation.params.get('dimensions') is not None:
        raise refuse(graph, equation, 'with an order of dimensions')
    (x,), before, after = operands, equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if [size for size in before if size != 1] == [size for size in after if size != 1] and len(x.shape) == len(before):
        kept = iter(own for own, size in zip(x.shape, before, strict=True) if size != 1)
        return [graph.reshape(x, [1 if size == 1 else next(kept) for size in after])]
    return [graph.reshape(graph.expand(x, before), after)]


def _squeeze(graph, equation, operands):
    dropped = [axis % len(operands[0].shape) for axis in equation.params['dimensions']]
    return [graph.reshape(operands[0], [size for axis, size in enumerate(operands[0].shape) if axis not in dropped])]


def _transpose(graph, equation, operands):
    return [graph.transpose(operands[0], equation.params['permutation'])]


def _concatenate(graph, equation, operands):
    (out,), axis = equation.outvars, equation.params['dimension']
    operands = full(graph, equation, operands)
    if len(operands) == 1:
        return operands
    return [graph.add('Concat', operands, out.aval.shape, out.aval.dtype, axis=axis)]


def _stack(graph, equation, operands):
    (out,), axis = equation.outvars, equation.params['axis']
    rows = [[*x.shape[:axis], 1, *x.shape[axis:]] for x in (value.aval for value in equation.invars)]
    operands = [graph.reshape(x, row) for x, row in zip(full(graph, equation, operands), rows, strict=True)]
    return [graph.add('Concat', operands, out.aval.shape, out.aval.dtype, axis=axis)]


def _tile(graph, equation, operands):
    (x,), (out,) = full(graph, equation, operands), equation.outvars
    repeats = Constant(np.array(equation.params['reps'], np.int64))
    return [graph.add('Tile', [x, repeats], out.aval.shape, out.aval.dtype)]


def _unstack(graph, equation, operands):
    (x,), axis = full(graph, equation, operands), equation.params['axis']
    sizes = list(x.shape)
    rest = [size for n, size in enumerate(sizes) if n != axis]
    starts, stops = [0] * len(sizes), list(sizes)
    results = []
    for place in range(len(equation.outvars)):
        starts[axis], stops[axis] = place, place + 1
        results.append(graph.reshape(graph.slice(x, starts, stops, [1] * len(sizes)), rest))
    return results


def _slice(graph, equation, operands):
    (x,), params = operands, equation.params
    steps = params['strides'] or (1,) * len(x.shape)
    return [slice_lazily(graph, equation, x, params['start_indices'], params['limit_indices'], steps)]


def slice_lazily(graph: Graph, equation: Any, x: Value, *cuts: Sequence[Any]) -> Value:
    """Returns a slice of an equation's first operand; axes of length 1 in place of longer ones are kept.

    Args:
        graph: the graph under construction.
        equation: the operation.
        x: its operand.
        *cuts: starts, stops and steps of every axis.
    """
    sizes = equation.invars[0].aval.shape
    own = [
        (0, 1, 1) if size == 1 and whole != 1 else cut
        for cut, size, whole in zip(zip(*cuts, strict=True), x.shape, sizes, strict=True)
    ]
    return graph.slice(x, *(list(numbers) for numbers in zip(*own, strict=True))) if own else x


def _split(graph, equation, operands):
    (x,), axis = operands, equation.params['axis']
    results, start, sizes = [], 0, equation.invars[0].aval.shape
    for size in map(int, equation.params['sizes']):
        starts, stops = [0] * len(sizes), list(sizes)
        starts[axis], stops[axis] = start, start + size
        results.append(slice_lazily(graph, equation, x, starts, stops, [1] * len(sizes)))
        start += size
    return results


def _rev(graph, equation, operands):
    axes = [axis for axis in equation.params['dimensions'] if operands[0].shape[axis] != 1]
    return [graph.flip(operands[0], axes) if axes else operands[0]]


def _iota(graph, equation, operands):
    (out,), axis = equation.outvars, equation.params['dimension']
    shape, dtype = [1] * len(out.aval.shape), np.dtype(equation.params['dtype'])
    size = shape[axis] = out.aval.shape[axis]
    if isinstance(size, int):
        return [Constant(np.arange(size).astype(dtype).reshape(shape))]
    numbers = [Constant(np.array(0, np.int64)), graph.reshape(graph.size(size), ()), Constant(np.array(1, np.int64))]
    return [graph.reshape(graph.cast(graph.add('Range', numbers, (size,), np.int64), dtype), shape)]


def _dim_as_value(graph, equation, operands):
    size, (out,) = equation.params['dim'], equation.outvars
    return [graph.cast(graph.reshape(graph.size(size), ()), out.aval.dtype)]


def _reduction(operation: str, repeats: bool) -> Rule:
    """A reduction; `repeats` says whether the result depends on how often a value is repeated."""

    def rule(graph, equation, operands):
        (x,), axes = operands, list(equation.params['axes'])
        sizes = equation.invars[0].aval.shape
        if repeats:
            x = graph.expand(x, [size if axis in axes else x.shape[axis] for axis, size in enumerate(sizes)])
        if not axes:
            return [x]
        (wide,) = widen(graph, [x])
        shape = [size for axis, size in enumerate(x.shape) if axis not in axes]
        which = Constant(np.array(axes, np.int64))
        return [graph.cast(graph.add(operation, [wide, which], shape, wide.dtype, keepdims=0), x.dtype)]

    return rule


def _argument(operation: str) -> Rule:
    def rule(graph, equation, operands):
        (axis,), (x,) = equation.params['axes'], widen(graph, full(graph, equation, operands))
        shape = equation.outvars[0].aval.shape
        result = graph.add(operation, [x], shape, np.int64, axis=axis, keepdims=0)
        return [graph.cast(result, equation.params['index_dtype'])]

    return rule


def _cumsum(graph, equation, operands):
    (x,) = widen(graph, full(graph, equation, operands))
    axis = Constant(np.array(equation.params['axis'], np.int64))
    result = graph.add('CumSum', [x, axis], x.shape, x.dtype, reverse=int(equation.params['reverse']))
    return [graph.cast(result, operands[0].dtype)]


# Operations that only move elements: their rules apply to constants too.
VIEWS: dict[str, Rule] = {
    **{name: _identity for name in ('copy', 'copy_p', 'stop_gradient', 'optimization_barrier', 'device_put')},
    'broadcast_in_dim': _broadcast_in_dim,
    'reshape': _reshape,
    'squeeze': _squeeze,
    'transpose': _transpose,
    'slice': _slice,
    'split': _split,
    'rev': _rev,
    'iota': _iota,
}
RULES: dict[str, Rule] = {
    'concatenate': _concatenate,
    'stack': _stack,
    'tile': _tile,
    'unstack': _unstack,
    'dim_as_value': _dim_as_value,
    'reduce_sum': _reduction('ReduceSum', True),
    'reduce_prod': _reduction('ReduceProd', True),
    'reduce_max': _reduction('ReduceMax', False),
    'reduce_min': _reduction('ReduceMin', False),
    'reduce_and': _reduction('ReduceMin', False),
    'reduce_or': _reduction('ReduceMax', False),
    'argmax': _argument('ArgMax'),
    'argmin': _argument('ArgMin'),
    'cumsum': _cumsum,
}
