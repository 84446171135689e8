"""ONNX rules for JAX contractions, windows and padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bqat_jax.export.onnx_graph import Graph
from bqat_jax.export.onnx_operations import Rule, emit, full, refuse
from bqat_jax.export.onnx_values import Constant, Tensor, Value


def _dot_general(graph, equation, operands):
    (out,), ((left, right), (left_batch, right_batch)) = equation.outvars, equation.params['dimension_numbers']
    a, b = [graph.cast(value, out.aval.dtype) for value in full(graph, equation, operands)]
    free_a = [axis for axis in range(len(a.shape)) if axis not in (*left, *left_batch)]
    free_b = [axis for axis in range(len(b.shape)) if axis not in (*right, *right_batch)]
    batch = [a.shape[axis] for axis in left_batch]
    rows, columns = [a.shape[axis] for axis in free_a], [b.shape[axis] for axis in free_b]
    inner = _product([a.shape[axis] for axis in left])
    a, b = graph.transpose(a, [*left_batch, *free_a, *left]), graph.transpose(b, [*right_batch, *right, *free_b])
    # Without batch axes the left operand may have any number of row axes; with them it must have one.
    rows_now = [_product(rows)] if batch or not rows else rows
    a, b = graph.reshape(a, [*batch, *rows_now, inner]), graph.reshape(b, [*batch, inner, _product(columns)])
    result = graph.add('MatMul', [a, b], [*batch, *rows_now, _product(columns)], out.aval.dtype)
    return [graph.reshape(result, [*batch, *rows, *columns])]


def _product(sizes: Sequence[Any]) -> Any:
    result = 1
    for size in sizes:
        result = result * size
    return result


def _convolution(graph, equation, operands):
    params, (out,) = equation.params, equation.outvars
    if params['batch_group_count'] > 1:
        raise refuse(graph, equation, 'with groups of the batch')
    if not np.issubdtype(out.aval.dtype, np.floating):
        raise refuse(graph, equation, 'of integers')
    numbers = params['dimension_numbers']
    x, kernel = full(graph, equation, operands)
    x, kernel = graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)
    inserted = [(0, 0, 0), (0, 0, 0), *((0, 0, by - 1) for by in params['lhs_dilation'])]
    x = pad(graph, x, inserted, 0)
    padding = [(0, 0), (0, 0), *params['padding']]
    x = pad(graph, x, [(min(low, 0), min(high, 0), 0) for low, high in padding], 0)
    shape = [out.aval.shape[axis] for axis in numbers.out_spec]
    result = graph.add(
        'Conv',
        [x, kernel],
        shape,
        out.aval.dtype,
        strides=list(params['window_strides']),
        dilations=list(params['rhs_dilation']),
        group=params['feature_group_count'],
        pads=_pads([(max(low, 0), max(high, 0)) for low, high in params['padding']]),
        kernel_shape=[int(size) for size in kernel.shape[2:]],
    )
    return [graph.transpose(result, np.argsort(numbers.out_spec).tolist())]


def _pads(padding: Sequence[tuple[int, int]]) -> list[int]:
    return [int(low) for low, _ in padding] + [int(high) for _, high in padding]


def pad(graph: Graph, x: Value, padding: Sequence[tuple[int, int, int]], value: Value | float) -> Value:
    """Returns a padded value, as `jax.lax.pad` does.

    Args:
        graph: the graph under construction.
        x: the value.
        padding: (before, after, between the elements) for every axis; before and after may be negative.
        value: the padding value.
    """
    filling = value if isinstance(value, (Tensor, Constant)) else Constant(np.array(value, x.dtype))
    for axis, (_, _, between) in enumerate(padding):
        if between and x.shape[axis] != 1:
            x = _insert(graph, x, axis, between, filling)
    cut = [slice(max(-low, 0), size - max(-high, 0), 1) for (low, high, _), size in zip(padding, x.shape, strict=True)]
    x = graph.slice(x, [own.start for own in cut], [own.stop for own in cut], [1] * len(cut))
    return _pad_edges(graph, x, [(max(low, 0), max(high, 0)) for low, high, _ in padding], filling)


def _pad_edges(graph: Graph, x: Value, padding: Sequence[tuple[int, int]], filling: Value) -> Value:
    if not any(low or high for low, high in padding):
        return x
    shape = [size + int(low) + int(high) for size, (low, high) in zip(x.shape, padding, strict=True)]
    return graph.add('Pad', [x, Constant(np.array(_pads(padding), np.int64)), filling], shape, x.dtype)


def _insert(graph: Graph, x: Value, axis: int, between: int, filling: Value) -> Value:
    """Inserts elements between those along an axis: adds an axis, pads it and merges it."""
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    x = graph.reshape(x, [*before, size, 1, *after])
    edges = [(0, 0)] * (axis + 1) + [(0, between)] + [(0, 0)] * len(after)
    x = graph.reshape(_pad_edges(graph, x, edges, filling), [*before, size * (between + 1), *after])
    stops = [*before, size * (between + 1) - between, *after]
    return graph.slice(x, [0] * len(stops), stops, [1] * len(stops))


def _pad(graph, equation, operands):
    x, value = full(graph, equation, operands)
    return [pad(graph, x, equation.params['padding_config'], value)]


def _window(kind: str) -> Rule:
    """A reduction over windows; `kind` is max, min or sum."""

    def rule(graph, equation, operands):
        params, (x,) = equation.params, full(graph, equation, operands)
        if any(by != 1 for by in params['base_dilation']):
            raise refuse(graph, equation, 'with gaps between the elements')
        if x.dtype != np.float32:
            raise refuse(graph, equation, f'of {x.dtype.name}')
        sizes = params['window_dimensions']
        axes = [
            n
            for n, size in enumerate(sizes)
            if (size, params['window_strides'][n], params['padding'][n]) != (1, 1, (0, 0))
        ]
        if not axes:
            return [x]
        if len(axes) > 3:
            raise refuse(graph, equation, f'over {len(axes)} axes')
        rest = [n for n in range(len(sizes)) if n not in axes]
        shape = equation.outvars[0].aval.shape
        order = [*rest, *axes]
        # ONNX needs two leading axes, batch and channels; more axes are merged into one.
        front = (
            [x.shape[n] for n in rest]
            if len(rest) == 2 and (kind != 'sum')
            else [_product([x.shape[n] for n in rest]), 1]
        )
        x = graph.reshape(graph.transpose(x, order), [*front, *(x.shape[n] for n in axes)])
        edge = {'max': -np.inf, 'min': np.inf, 'sum': 0}[kind]
        padding = [params['padding'][n] for n in axes]
        x = pad(graph, x, [(0, 0, 0), (0, 0, 0), *((low, high, 0) for low, high in padding)], edge)
        attributes = {
            'kernel_shape': [int(sizes[n]) for n in axes],
            'strides': [int(params['window_strides'][n]) for n in axes],
            'dilations': [int(params['window_dilation'][n]) for n in axes],
        }
        result = _pool(graph, kind, x, [*front, *(shape[n] for n in axes)], attributes)
        result = graph.reshape(result, [shape[n] for n in order])
        return [graph.transpose(result, np.argsort(order).tolist())]

    return rule


def _pool(graph: Graph, kind: str, x: Value, shape: Sequence[Any], attributes: dict[str, list[int]]) -> Value:
    if kind == 'sum':  # AveragePool times the window's size would not be exact
        ones = Constant(np.ones((1, 1, *attributes['kernel_shape']), np.float32))
        return graph.add('Conv', [x, ones], shape, x.dtype, **attributes)
    if kind == 'max':
        return graph.before_quantizer(
            graph.tensor(x), lambda x: graph.add('MaxPool', [x], shape, x.dtype, **attributes)
        )
    return emit(graph, 'Neg', [graph.add('MaxPool', [emit(graph, 'Neg', [x])], shape, x.dtype, **attributes)])


RULES: dict[str, Rule] = {
    'dot_general': _dot_general,
    'conv_general_dilated': _convolution,
    'pad': _pad,
    'reduce_window_max': _window('max'),
    'reduce_window_min': _window('min'),
    'reduce_window_sum': _window('sum'),
}
