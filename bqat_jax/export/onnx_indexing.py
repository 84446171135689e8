"""ONNX rules for JAX indexing."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bqat_jax.export.onnx_graph import Graph
from bqat_jax.export.onnx_operations import Rule, emit, full, refuse
from bqat_jax.export.onnx_values import Constant, Value, is_static


def _dynamic_slice(graph, equation, operands):
    x, *starts = operands
    (x,), sizes = [graph.expand(x, equation.invars[0].aval.shape)], equation.params['slice_sizes']
    return [_slice_from(graph, x, dict(enumerate(starts)), sizes)]


def _slice_from(graph: Graph, x: Value, starts: dict[int, Value], sizes: Sequence[Any]) -> Value:
    """A slice of the given sizes; its starts, by axis, are clamped to the bounds."""
    for axis, start in starts.items():
        size, whole = sizes[axis], x.shape[axis]
        if size == whole:
            continue
        last = whole - size
        if isinstance(start, Constant) and isinstance(last, int):
            first = min(max(int(start.array.reshape(())), 0), last)
            firsts, stops = [0] * len(x.shape), list(x.shape)
            firsts[axis], stops[axis] = first, first + size
            x = graph.slice(x, firsts, stops, [1] * len(x.shape))
            continue
        first = graph.cast(graph.reshape(start, (1,)), np.int64)
        first = emit(
            graph, 'Min', [emit(graph, 'Max', [first, Constant(np.zeros(1, np.int64))]), graph.shape_tensor([last])]
        )
        stop = emit(graph, 'Add', [first, graph.shape_tensor([size])])
        which = Constant(np.array([axis], np.int64))
        x = graph.add('Slice', [x, first, stop, which], [*x.shape[:axis], size, *x.shape[axis + 1 :]], x.dtype)
    return x


def _gather(graph, equation, operands):
    """Writes a gather as slices if its indices allow, and else as Gather or GatherND."""
    numbers, sizes = equation.params['dimension_numbers'], equation.params['slice_sizes']
    x, indices = full(graph, equation, operands)
    indexed, grouped = numbers.start_index_map, numbers.operand_batching_dims
    # Axes that are not indexed start at 0.
    rest = [size if n not in (*indexed, *grouped) else x.shape[n] for n, size in enumerate(sizes)]
    x = graph.slice(x, [0] * len(rest), rest, [1] * len(rest))
    lasts = [x.shape[n] - sizes[n] for n in indexed]
    mode = equation.params['mode']
    is_inside = None
    if not _is_within(indices, lasts) and mode != jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
            is_inside = _inside(graph, indices, lasts)
        elif mode != jax.lax.GatherScatterMode.CLIP:
            raise refuse(graph, equation, f'in mode {mode}')
        indices = _clip(graph, indices, lasts)
    grid = _find_grid(equation, indices) if _is_within(indices, lasts) else None
    if grid is not None:
        result = _slice_grid(graph, equation, x, *grid)
    elif len(indices.shape) == 1 and not grouped:
        starts = {axis: _index(graph, indices, place) for place, axis in enumerate(indexed)}
        x = _slice_from(graph, x, starts, [sizes[n] if n in indexed else x.shape[n] for n in range(len(sizes))])
        result = graph.reshape(x, equation.outvars[0].aval.shape)
    else:
        result = _gather_many(graph, equation, x, indices)
    return [_fill(graph, equation, result, is_inside)]


def _is_within(indices: Value, lasts: Sequence[Any]) -> bool:
    if not isinstance(indices, Constant) or not is_static(lasts):
        return False
    return bool(np.all(indices.array >= 0) and np.all(indices.array <= np.array(lasts)))


def _find_grid(equation: Any, indices: Value) -> tuple[dict[int, tuple[Any, Any, int]], dict[int, int]] | None:
    """Finds slices for constant indices, as in x[:, ::2, 3]: each axis of the indices steps along one of the operand.

    Returns:
        (start, stop, step) by axis of the operand, and the operand's axis by axis of the indices; None if there are no
        such slices.
    """
    numbers, sizes = equation.params['dimension_numbers'], equation.params['slice_sizes']
    if not isinstance(indices, Constant) or not indices.array.size or numbers.operand_batching_dims:
        return None
    cuts, walked = {}, {}
    for place, axis in enumerate(numbers.start_index_map):
        own = indices.array[..., place]
        along = [n for n in range(own.ndim) if np.any(own != np.take(own, [0], n))]
        first = int(own.ravel()[0])
        cuts[axis] = (first, first + sizes[axis], 1)
        if along:
            line = np.moveaxis(own, along[0], 0).reshape(own.shape[along[0]], -1)[:, 0]
            steps = np.unique(np.diff(line))
            is_even = len(along) == 1 and len(steps) == 1 and steps[0] > 0
            if not is_even or axis not in numbers.collapsed_slice_dims or along[0] in walked:
                return None
            cuts[axis], walked[along[0]] = (first, int(line[-1]) + 1, int(steps[0])), axis
    free = [axis for axis in numbers.collapsed_slice_dims if axis not in walked.values()]
    for n, size in enumerate(indices.array.shape[:-1]):
        if n not in walked:
            if size != 1 or not free:
                return None
            walked[n] = free.pop()
    return cuts, walked


def _slice_grid(graph: Graph, equation: Any, x: Value, cuts: dict[int, Any], walked: dict[int, int]) -> Value:
    numbers = equation.params['dimension_numbers']
    whole = [cuts.get(n, (0, size, 1)) for n, size in enumerate(x.shape)]
    x = graph.slice(x, *(list(part) for part in zip(*whole, strict=True)))
    left = [n for n in range(len(x.shape)) if n in walked.values() or n not in numbers.collapsed_slice_dims]
    x = graph.reshape(x, [x.shape[n] for n in left])
    batch = [left.index(walked[n]) for n in sorted(walked)]
    others = [n for n in range(len(left)) if n not in batch]
    return _into_places(graph, x, batch, others, list(numbers.offset_dims))


def _index(graph: Graph, indices: Value, place: int) -> Value:
    return graph.reshape(graph.slice(indices, [place], [place + 1], [1]), ())


def _clip(graph: Graph, indices: Value, lasts: Sequence[Any]) -> Value:
    limits = graph.cast(graph.shape_tensor(lasts), np.int64)
    zero = Constant(np.array(0, np.int64))
    return emit(graph, 'Min', [emit(graph, 'Max', [graph.cast(indices, np.int64), zero]), limits])


def _inside(graph: Graph, indices: Value, lasts: Sequence[Any]) -> Value:
    """Whether every index vector is within the operand's bounds."""
    wide = graph.cast(indices, np.int64)
    low = emit(graph, 'GreaterOrEqual', [wide, Constant(np.array(0, np.int64))], bool)
    high = emit(graph, 'LessOrEqual', [wide, graph.shape_tensor(lasts)], bool)
    both = graph.cast(emit(graph, 'And', [low, high]), np.int32)
    last = Constant(np.array([len(both.shape) - 1], np.int64))
    return graph.cast(graph.add('ReduceMin', [both, last], both.shape[:-1], np.int32, keepdims=0), bool)


def _fill(graph: Graph, equation: Any, result: Value, is_inside: Value | None) -> Value:
    """Writes the fill value for index vectors out of bounds."""
    if is_inside is None:
        return result
    offsets, rank = equation.params['dimension_numbers'].offset_dims, len(result.shape)
    sizes = iter(is_inside.shape)
    mask = graph.reshape(is_inside, [1 if axis in offsets else next(sizes) for axis in range(rank)])
    value = equation.params['fill_value']
    if value is None:
        value = _FILLINGS[result.dtype.kind](result.dtype)
    return emit(graph, 'Where', [mask, result, Constant(np.array(value, result.dtype))])


def _gather_many(graph: Graph, equation: Any, x: Value, indices: Value) -> Value:
    numbers, sizes = equation.params['dimension_numbers'], equation.params['slice_sizes']
    indexed, grouped = list(numbers.start_index_map), list(numbers.operand_batching_dims)
    own = list(numbers.start_indices_batching_dims)
    dtype, rank = x.dtype, len(equation.outvars[0].aval.shape)
    if len(indexed) == 1 and not grouped and (numbers.collapsed_slice_dims or sizes[indexed[0]] == 1):
        (axis,) = indexed
        flat = graph.reshape(indices, indices.shape[:-1])
        shape = [*x.shape[:axis], *flat.shape, *x.shape[axis + 1 :]]
        result = graph.add('Gather', [x, flat], shape, dtype, axis=axis)
        places = list(range(axis, axis + len(flat.shape)))
        others = [n for n in range(len(shape)) if n not in places]
        offsets = list(numbers.offset_dims)
        kept = others if numbers.collapsed_slice_dims else [*others[:axis], None, *others[axis:]]
        return _into_places(graph, result, places, kept, offsets)
    if any(sizes[n] != 1 for n in indexed) or set(numbers.collapsed_slice_dims) != set(indexed):
        raise refuse(graph, equation, 'of slices at several places')
    others = [n for n in range(len(sizes)) if n not in (*indexed, *grouped)]
    places = [n for n in range(len(indices.shape) - 1) if n not in own]
    x = graph.transpose(x, [*grouped, *indexed, *others])
    indices = graph.transpose(graph.cast(indices, np.int64), [*own, *places, len(indices.shape) - 1])
    shape = [*indices.shape[:-1], *x.shape[len(grouped) + len(indexed) :]]
    result = graph.add('GatherND', [x, indices], shape, dtype, batch_dims=len(grouped))
    batch = np.argsort([*own, *places]).tolist()
    return _into_places(graph, result, batch, list(range(len(batch), rank)), list(numbers.offset_dims))


def _into_places(
    graph: Graph, x: Value, batch: Sequence[int], kept: Sequence[int | None], offsets: Sequence[int]
) -> Value:
    """Moves the axes `kept` to `offsets` and those of the indices to the rest; None is a new axis of length 1."""
    if None in kept:
        x = graph.reshape(x, [*x.shape, 1])
    axes = [len(x.shape) - 1 if axis is None else axis for axis in kept]
    ordered, own = iter(batch), dict(zip(offsets, axes, strict=True))
    return graph.transpose(x, [own[n] if n in own else next(ordered) for n in range(len(x.shape))])


# Default fill values for indices out of bounds, by kind of dtype.
_FILLINGS = {
    'f': lambda dtype: np.nan,
    'i': lambda dtype: np.iinfo(dtype).min,
    'u': lambda dtype: np.iinfo(dtype).max,
    'b': lambda dtype: True,
}
RULES: dict[str, Rule] = {'dynamic_slice': _dynamic_slice, 'gather': _gather}
