"""Builds an ONNX graph: nodes, initializers and shapes.

Equal nodes and equal initializers are shared. Reshapes, transposes and slices of constants and of weights in codes are
computed at export. Those of a quantized value are moved before its quantizer: from opset 21 on onnxruntime fails on
operations that only move elements (Transpose, Reshape, Slice, MaxPool) right after a DequantizeLinear of int8.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from bqat_jax.export.onnx_model import OnnxOptions, Parts, finish_model
from bqat_jax.export.onnx_values import (
    Constant,
    Dequantized,
    Tensor,
    Value,
    is_small,
    is_static,
    map_arrays,
    parse_dimension,
    reshape_scale,
    store_codes,
    where_longer,
)

LAST, FIRST = np.iinfo(np.int64).max, np.iinfo(np.int64).min
_KINDS = ('bool', 'uint8', 'int8', 'int16', 'uint16', 'int32', 'uint32', 'int64', 'uint64', 'float32', 'float64')
# Allowed only between two casts.
_PASSING = ('bfloat16', 'float16')


class Graph:
    """A graph under construction.

    Attributes:
        options: options of the model.
        place: the path of the current operation, for messages.
    """

    def __init__(self, options: OnnxOptions, inputs: Sequence[Tensor]):
        """Starts a graph.

        Args:
            options: options of the model.
            inputs: inputs of the graph; all symbolic dimensions must use one symbol, the batch size.

        Raises:
            ValueError: if there are two symbols.
        """
        self.options, self.place = options, ''
        self._inputs = list(inputs)
        self._tensors = {value.name: value for value in inputs}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._made: dict[Any, Tensor] = {}
        self._transposed: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        self._reshaped: dict[str, Tensor] = {}
        self._quantizers: dict[str, tuple[Tensor, Any]] = {}
        self._quantized: set[str] = set()
        self._pairs: dict[Any, tuple[Tensor, Tensor]] = {}
        self._observed: list[tuple[str, Tensor]] = []
        symbols = {parse_dimension(size)[1] for x in inputs for size in x.shape if not isinstance(size, int)}
        if len(symbols) > 1:
            raise ValueError(
                f'The inputs have several unknown sizes, {sorted(symbols)}: ONNX export supports one, the batch.'
            )

    def add(
        self, operation: str, operands: Sequence[Value | None], shape: Any, dtype: Any, **attributes: Any
    ) -> Tensor:
        """Adds a node and returns its output; reuses an equal node.

        Args:
            operation: the ONNX operator.
            operands: inputs of the node; None for an omitted optional one.
            shape: shape of the output.
            dtype: dtype of the output.
            **attributes: attributes of the node.
        """
        dtype = self.check_dtype(dtype, operation == 'Cast')
        names = ['' if value is None else self.name_of(value) for value in operands]
        key = (operation, tuple(names), repr(sorted(attributes.items())))
        if key not in self._made:
            result = self._new(operation, shape, dtype)
            self._nodes.append(helper.make_node(operation, names, [result.name], name=result.name, **attributes))
            self._made[key] = result
        return self._made[key]

    def check_dtype(self, dtype: Any, in_passing: bool = True) -> np.dtype:
        """Returns a dtype as a NumPy dtype.

        Args:
            dtype: dtype of a value.
            in_passing: whether the value is only cast to it and back.

        Raises:
            ValueError: if a model cannot have it.
        """
        dtype = np.dtype(dtype)
        if dtype.name not in (_KINDS + _PASSING if in_passing else _KINDS):
            raise ValueError(f'ONNX export does not support the dtype {dtype.name}{self.place}. Use float32.')
        return dtype

    def name_of(self, value: Value) -> str:
        """Returns the name of a value in the graph; adds the value if needed."""
        if isinstance(value, Constant):
            return self._of_constant(value)
        return self.tensor(value).name

    def tensor(self, value: Value) -> Tensor:
        """Returns a value as a tensor of the graph."""
        if isinstance(value, Dequantized):
            return self._of_dequantized(value)
        if isinstance(value, Constant):
            return Tensor(self._of_constant(value), value.shape, value.dtype)
        return value

    def transpose(self, value: Value, permutation: Sequence[int]) -> Value:
        """Returns a value with permuted axes, as `numpy.transpose` does."""
        permutation = tuple(permutation)
        if permutation == tuple(range(len(permutation))):
            return value
        if not isinstance(value, Tensor):
            return map_arrays(value, lambda array: np.transpose(array, permutation))
        if value.name in self._quantizers:
            return self.before_quantizer(value, lambda x: self.transpose(x, permutation))
        source, before = self._transposed.get(value.name, (value, tuple(range(len(permutation)))))
        composed = tuple(before[axis] for axis in permutation)
        if composed == tuple(range(len(composed))):
            return source
        shape = tuple(source.shape[axis] for axis in composed)
        result = self.add('Transpose', [source], shape, value.dtype, perm=composed)
        self._transposed[result.name] = (source, composed)
        return result

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """Returns a reshaped value."""
        shape = tuple(shape)
        if shape == tuple(value.shape):
            return value
        if isinstance(value, Constant):
            return dataclasses.replace(value, array=value.array.reshape(shape))
        if isinstance(value, Dequantized):
            scale = reshape_scale(value, shape)
            if scale is not None:
                return dataclasses.replace(value, codes=value.codes.reshape(shape), scale=scale)
        source = self.tensor(value)
        if source.name in self._quantizers:
            return self.before_quantizer(source, lambda x: self.reshape(x, shape))
        source = self._reshaped.get(source.name, source)
        if shape == tuple(source.shape):
            return source
        unknown = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        if len(unknown) == 1 and 0 not in shape:
            target = Constant(np.array([size if isinstance(size, int) else -1 for size in shape], np.int64))
        else:
            target = self.shape_tensor(shape)
        result = self.add('Reshape', [source, target], shape, value.dtype)
        self._reshaped[result.name] = source
        return result

    def expand(self, value: Value, shape: Sequence[Any]) -> Value:
        """Returns a value repeated along axes of length 1, as `numpy.broadcast_to` does."""
        shape = tuple(shape)
        if shape == tuple(value.shape):
            return value
        if isinstance(value, Constant) and not value.codes and is_small(shape, value.array.size):
            return Constant(np.broadcast_to(value.array, shape))
        if isinstance(value, Tensor) and value.name in self._quantizers:
            return self.before_quantizer(value, lambda x: self.expand(x, shape))
        own = (1,) * (len(shape) - len(value.shape)) + tuple(value.shape)
        sizes = [1 if size == before else size for size, before in zip(shape, own, strict=True)]
        return self.add('Expand', [value, self.shape_tensor(sizes)], shape, value.dtype)

    def cast(self, value: Value, dtype: Any) -> Value:
        """Returns a value cast to another dtype."""
        dtype = self.check_dtype(dtype)
        if dtype == value.dtype:
            return value
        if isinstance(value, Constant):
            return Constant(value.array.astype(dtype), value.codes and dtype.kind != 'b')
        return self.add('Cast', [value], value.shape, dtype, to=helper.np_dtype_to_tensor_dtype(dtype))

    def slice(self, value: Value, starts: Sequence[int], stops: Sequence[Any], steps: Sequence[int]) -> Value:
        """Returns a slice of a value.

        Args:
            value: the value.
            starts: first index of every axis.
            stops: end of every axis; may be symbolic.
            steps: step of every axis, above 0.
        """
        cuts = list(zip(starts, stops, steps, strict=True))
        axes = [n for n, (cut, size) in enumerate(zip(cuts, value.shape, strict=True)) if cut != (0, size, 1)]
        if not axes:
            return value
        if not isinstance(value, Tensor):
            slices = tuple(slice(*cut) for cut in cuts)
            return map_arrays(value, lambda array: array[where_longer(array, slices)])
        if value.name in self._quantizers:
            return self.before_quantizer(value, lambda x: self.slice(x, starts, stops, steps))
        shape = tuple(_sliced(*cut) if n in axes else value.shape[n] for n, cut in enumerate(cuts))
        ends = [_relative(stops[n], value.shape[n]) for n in axes]
        rest = [[starts[n] for n in axes], axes, [steps[n] for n in axes]]
        first, which, by = [Constant(np.array(numbers, np.int64)) for numbers in rest]
        return self.add('Slice', [value, first, self.shape_tensor(ends), which, by], shape, value.dtype)

    def flip(self, value: Value, axes: Sequence[int]) -> Value:
        """Returns a value reversed along axes."""
        if not isinstance(value, Tensor):
            slices = tuple(slice(None, None, -1 if n in axes else None) for n in range(len(value.shape)))
            return map_arrays(value, lambda array: array[slices])
        if value.name in self._quantizers:
            return self.before_quantizer(value, lambda x: self.flip(x, axes))
        numbers = [[-1] * len(axes), [FIRST] * len(axes), list(axes), [-1] * len(axes)]
        return self.add('Slice', [value, *(Constant(np.array(x, np.int64)) for x in numbers)], value.shape, value.dtype)

    def shape_tensor(self, shape: Sequence[Any]) -> Value:
        """Returns a shape as int64 values; symbolic sizes are computed from the inputs' batch size."""
        if is_static(shape):
            return Constant(np.array(shape, np.int64))
        parts = [Constant(np.array([x], np.int64)) if isinstance(x, int) else self.size(x) for x in shape]
        return parts[0] if len(parts) == 1 else self.add('Concat', parts, (len(parts),), np.int64, axis=0)

    def size(self, size: Any) -> Value:
        """Returns a symbolic dimension as int64 (1,)."""
        factor, symbol, offset = parse_dimension(size)
        source, axis = next((x, n) for x in self._inputs for n, own in enumerate(x.shape) if str(own) == symbol)
        result = self.add('Shape', [source], (1,), np.int64, start=axis, end=axis + 1)
        if factor != 1:
            result = self.add('Mul', [result, Constant(np.array([factor], np.int64))], (1,), np.int64)
        if offset:
            result = self.add('Add', [result, Constant(np.array([offset], np.int64))], (1,), np.int64)
        return result

    def is_observed(self, name: str) -> bool:
        """Returns whether a value with this name becomes an output."""
        return bool(self.options.observed) and name.startswith(self.options.observed)

    def observe(self, name: str, value: Value) -> None:
        """Adds a value as an output named '<name>@<index>'."""
        index = sum(other.rpartition('@')[0] == name for other, _ in self._observed)
        self._observed.append((f'{name}@{index}', self.tensor(value)))

    def quantizer(self, value: Value, scale: np.ndarray, lower: int, upper: int) -> tuple[Tensor, Tensor]:
        """Returns (codes of 8 bits, codes·scale): QuantizeLinear, Clip and DequantizeLinear with zero point 0.

        Args:
            value: the value to quantize.
            scale: () or, for a scale along an axis, of the rank of `value` with ones elsewhere.
            lower: the smallest code.
            upper: the largest code.
        """
        source = self.tensor(value)
        key = ('quantizer', source.name, scale.shape, scale.tobytes(), lower, upper)
        if key not in self._pairs:
            self._pairs[key] = self._write_quantizer(source, scale, lower, upper)
        codes, values = self._pairs[key]
        if scale.ndim == 0:
            self._quantizers[values.name] = (source, (scale, lower, upper))
        return codes, values

    def before_quantizer(self, value: Tensor, change: Callable[[Tensor], Value]) -> Value:
        """Applies an operation that moves or drops elements, before the value's quantizer if it has one.

        Args:
            value: a tensor.
            change: the operation; it must not change an element.
        """
        if value.name not in self._quantizers:
            return change(value)
        source, parameters = self._quantizers[value.name]
        return self.quantizer(change(source), *parameters)[1]

    def model(self, outputs: Sequence[tuple[str, Value]]) -> onnx.ModelProto:
        """Returns the finished model.

        Args:
            outputs: names and values of the outputs.
        """
        results = [(name, self.tensor(value)) for name, value in [*outputs, *self._observed]]
        return finish_model(self.options, Parts(self._inputs, self._nodes, self._initializers, self._tensors), results)

    def _new(self, operation: str, shape: Any, dtype: Any) -> Tensor:
        result = Tensor(f'{operation}_{len(self._tensors)}', tuple(shape), np.dtype(dtype))
        self._tensors[result.name] = result
        return result

    def _append(self, operation: str, names: Sequence[str], shape: Any, dtype: Any, **attributes: Any) -> Tensor:
        """Adds a node even if there is an equal one."""
        result = self._new(operation, shape, dtype)
        self._nodes.append(helper.make_node(operation, names, [result.name], name=result.name, **attributes))
        return result

    def _initialize(self, array: np.ndarray) -> str:
        name = f'constant_{len(self._initializers)}'
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name

    def _of_constant(self, value: Constant) -> str:
        content = hashlib.sha1(np.ascontiguousarray(value.array).tobytes()).digest()
        key = (value.codes, value.dtype, value.shape, content)
        if key not in self._made:
            self._made[key] = self._store(value)
        return self._made[key].name

    def _store(self, value: Constant) -> Tensor:
        self.check_dtype(value.dtype)
        if not value.codes:
            return Tensor(self._initialize(value.array), value.shape, value.dtype)
        stored = store_codes(value.array, self.options.opset)
        name = self._initialize(stored.array)
        result = Tensor(name, value.shape, stored.array.dtype)
        if result.dtype == value.dtype:
            return result
        to = helper.np_dtype_to_tensor_dtype(value.dtype)
        result = self._append('Cast', [name], value.shape, value.dtype, to=to)
        if stored.doubled:
            two, one = (Constant(np.array(number, value.dtype)) for number in (2, 1))
            result = self.add(
                'Add', [self.add('Mul', [result, two], value.shape, value.dtype), one], value.shape, value.dtype
            )
        return result

    def _of_dequantized(self, value: Dequantized) -> Tensor:
        arrays = (value.codes, value.scale)
        contents = [hashlib.sha1(np.ascontiguousarray(array).tobytes()).digest() for array in arrays]
        key = ('dequantized', value.lower, value.upper, value.shape, value.scale.shape, *contents)
        if key not in self._made:
            self._made[key] = self._dequantize(value)
        return self._made[key]

    def _dequantize(self, value: Dequantized) -> Tensor:
        """Nodes that qonnx reads: it accepts fewer than 8 bits, or a scale along an axis, only after QuantizeLinear."""
        longer = [axis for axis, size in enumerate(value.scale.shape) if size > 1]
        if len(longer) > 1:  # DequantizeLinear has no scale along several axes
            ones = np.ones((1,) * value.codes.ndim, np.float32)
            codes = self._dequantize(dataclasses.replace(value, scale=ones))
            return self.add('Mul', [codes, Constant(value.scale)], value.shape, np.float32)
        info = np.iinfo(value.codes.dtype)
        if not longer and (value.lower, value.upper) == (info.min, info.max):
            parameters, attributes = self._scale_and_zero(value.scale, value.codes.dtype)
            name = self._initialize(value.codes)
            return self._append('DequantizeLinear', [name, *parameters], value.shape, np.float32, **attributes)
        # qonnx cannot run nodes that read 4 bits.
        codes = self._append(
            'Cast', [self._initialize(value.codes)], value.shape, np.float32, to=onnx.TensorProto.FLOAT
        )
        weights = self.add('Mul', [codes, Constant(value.scale)], value.shape, np.float32)
        return self.quantizer(weights, value.scale if longer else value.scale.reshape(()), value.lower, value.upper)[1]

    def _write_quantizer(self, source: Tensor, scale: np.ndarray, lower: int, upper: int) -> tuple[Tensor, Tensor]:
        """Nodes that share no scale and no input with others: qonnx overwrites scales and names nodes after inputs."""
        if source.name in self._quantized:
            source = self._append('Identity', [source.name], source.shape, source.dtype)
        self._quantized.add(source.name)
        dtype = np.dtype(np.int8 if lower < 0 else np.uint8)
        parameters, attributes = self._scale_and_zero(scale, dtype)
        codes = self._append('QuantizeLinear', [source.name, *parameters], source.shape, dtype, **attributes)
        if (lower, upper) != (np.iinfo(dtype).min, np.iinfo(dtype).max):
            bounds = [self._of_constant(Constant(np.array(bound, dtype))) for bound in (lower, upper)]
            codes = self._append('Clip', [codes.name, *bounds], source.shape, dtype)
        values = self._append('DequantizeLinear', [codes.name, *parameters], source.shape, np.float32, **attributes)
        return codes, values

    def _scale_and_zero(self, scale: np.ndarray, dtype: np.dtype) -> tuple[list[str], dict[str, int]]:
        """Initializers of scale and zero point, and their axis."""
        longer = [axis for axis, size in enumerate(scale.shape) if size > 1]
        flat = scale.ravel() if longer else scale.reshape(())
        names = [self._initialize(flat), self._initialize(np.zeros(flat.shape, dtype))]
        return names, {'axis': longer[0]} if longer else {}


def _sliced(start: int, stop: Any, step: int) -> Any:
    return stop - start if step == 1 else -((start - stop) // step)


def _relative(stop: Any, size: Any) -> Any:
    """The end of a slice, relative to the end of the axis if that makes it an int."""
    beyond = stop - size
    if isinstance(stop, int) or not isinstance(beyond, int):
        return stop
    return beyond if beyond < 0 else LAST
