"""The values of an ONNX graph under construction, the storage of codes, and names of symbolic dimensions.

The shape of a value may have ones in place of the JAX value's larger sizes: ONNX operators broadcast, so an axis is
repeated only if an operator needs it. The rank is that of the JAX value, or 0 for a scalar.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

MIN_CODES = 64
# A constant is folded if it has at most this many elements, or at most four times those of its largest operand.
MANY_ELEMENTS = 65536
_LINEAR = re.compile(r'(?:(\d+)\*)?([A-Za-z_]\w*)(?: ([+-]) (\d+))?')


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the graph: an input or a node's output.

    Attributes:
        name: its name in the graph.
        shape: ints and symbolic dimensions.
        dtype: its NumPy dtype.
    """

    name: str
    shape: tuple[Any, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array known at export; it becomes an initializer if a node reads it.

    Attributes:
        array: its values.
        codes: whether they are stored in the fewest bits, with arithmetic left to the model.
    """

    array: np.ndarray
    codes: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array."""
        return self.array.dtype


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """Weights codes·scale, which become nodes once another node reads them; shape operations act on both arrays.

    Attributes:
        codes: int8 or uint8.
        scale: float32 with the rank of `codes`; an axis has its size there or 1.
        lower: the smallest possible code.
        upper: the largest possible code.
    """

    codes: np.ndarray
    scale: np.ndarray
    lower: int
    upper: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes."""
        return self.codes.shape

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return self.scale.dtype


Value = Tensor | Constant | Dequantized


@dataclasses.dataclass(frozen=True)
class Stored:
    """Integers as they are stored.

    Attributes:
        array: an array of 2, 4 or 8 bits.
        doubled: whether the integers are 2·array + 1.
    """

    array: np.ndarray
    doubled: bool


def is_codes(array: np.ndarray) -> bool:
    """Returns whether an array has at least 64 elements, all integers of 8 bits and not all equal."""
    if array.size < MIN_CODES or array.dtype.kind not in 'iuf':
        return False
    lower, upper = array.min(), array.max()
    fits = (lower >= -128 and upper <= 127) or (lower >= 0 and upper <= 255)  # false for NaN
    return bool(fits and lower < upper and (array.dtype.kind != 'f' or np.all(array == np.rint(array))))


def store_codes(array: np.ndarray, opset: int) -> Stored:
    """Returns integers in the fewest bits: 2 (from opset 25 on), 4 or 8.

    Args:
        array: integers that fit 8 bits.
        opset: opset of the model.
    """
    numbers = array.astype(np.int16)
    smallest = _smallest(numbers, opset)
    if array.dtype in (np.float32, np.int32) and np.all(numbers % 2 == 1):
        halves = (numbers - 1) // 2
        smaller = _smallest(halves, opset)
        if _bits(smaller) < _bits(smallest):
            return Stored(halves.astype(smaller), True)
    return Stored(numbers.astype(smallest), False)


def _smallest(numbers: np.ndarray, opset: int) -> np.dtype:
    kinds = ('uint2', 'int2', 'uint4', 'int4', 'uint8', 'int8')
    lower, upper = (int(numbers.min()), int(numbers.max())) if numbers.size else (0, 0)
    for kind in kinds[0 if opset >= 25 else 2 :]:
        dtype = np.dtype(kind) if kind.endswith('8') else np.dtype(getattr(jnp, kind))
        info = jnp.iinfo(dtype)
        if info.min <= lower and upper <= info.max:
            return dtype
    raise ValueError(f'codes from {lower} to {upper} do not fit 8 bits.')


def _bits(dtype: np.dtype) -> int:
    return jnp.iinfo(dtype).bits


def is_static(shape: Sequence[Any]) -> bool:
    """Returns whether a shape has no symbolic dimension."""
    return all(isinstance(size, int) for size in shape)


def is_small(shape: Sequence[Any], elements: int) -> bool:
    """Returns whether to fold a constant of this shape, computed from arrays of up to `elements` elements."""
    return is_static(shape) and math.prod(shape) <= max(4 * elements, MANY_ELEMENTS)


def broadcast_shape(*shapes: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the shape that shapes broadcast to."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def parse_dimension(size: Any) -> tuple[int, str, int]:
    """Returns (k, name, c) of a symbolic dimension k·name + c.

    Raises:
        ValueError: if it is of another form.
    """
    match = _LINEAR.fullmatch(str(size))
    if not match:
        raise ValueError(
            f'ONNX export cannot compute the size {size}: sizes must be integer multiples of the batch size plus a '
            'constant.'
        )
    offset = int(match[4] or 0)
    return int(match[1] or 1), match[2], -offset if match[3] == '-' else offset


def dimension_name(size: Any) -> str:
    """Returns the name of a symbolic dimension in the model: 'batch', '2*batch', '2*batch + 1'."""
    return re.sub(r'\b(?!floordiv\b|mod\b|max\b|min\b)[A-Za-z_]\w*', 'batch', str(size))


def map_arrays(value: Constant | Dequantized, change: Any) -> Value:
    """Returns a constant with `change` applied to its arrays, codes and scale alike."""
    if isinstance(value, Constant):
        return dataclasses.replace(value, array=change(value.array))
    return dataclasses.replace(value, codes=change(value.codes), scale=change(value.scale))


def where_longer(array: np.ndarray, slices: Sequence[slice]) -> tuple[slice, ...]:
    """Returns slices for the axes longer than 1; along the others a scale has one entry for all codes."""
    return tuple(
        own if size > 1 or own.stop == own.start else slice(None) for own, size in zip(slices, array.shape, strict=True)
    )


def reshape_scale(value: Dequantized, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns the scale for reshaped codes; None if the scale varies along an axis that is merged or split."""
    if value.scale.size == 1:
        return value.scale.reshape((1,) * len(shape))
    if [size for size in shape if size > 1] != [size for size in value.shape if size > 1]:
        return None
    sizes = iter(own for own, size in zip(value.scale.shape, value.shape, strict=True) if size > 1)
    return value.scale.reshape([next(sizes) if size > 1 else 1 for size in shape])
