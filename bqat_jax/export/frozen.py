"""A trained network as plain NumPy arrays, every constant computed once: what is exported.

A quantized tensor is codes, and how they stand for values. There are two ways:

    uniform:  value = (code + shift) · scale · ...      one rounding to float32 for each operation, from left to right
    levels:   value = levels[code - lower]

and an input's code is found in one of two ways:

    thresholds:    code = lower + the number of thresholds that are <= x
    inverse step:  code = clip(round(x · inverse_step), lower, upper), ties to even
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bqat_jax.export.codes import pack, packed_size

# How a layer computes.
INTEGER, LOOKUP = 'integer', 'lookup'
HALF = 0.5
# Between the names in a path of another collection, whose names may hold a slash.
BETWEEN = '|'
# Whole numbers up to here are exact in float32, and sums of them in any order.
EXACT_IN_FLOAT32 = 2**24
EXACT_IN_INT32 = 2**31
LARGEST_PIXEL = 255


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How codes stand for values; arrays have the stack's axes first and broadcast against the codes.

    Attributes:
        bits: 1 to 8.
        lower: the smallest code.
        shift: float32, of uniform codes.
        scales: float32, of uniform codes, multiplied in turn.
        levels: float32 (.., number of levels), of others; None for uniform codes.
    """

    bits: int
    lower: int
    shift: np.ndarray
    scales: tuple[np.ndarray, ...] = ()
    levels: np.ndarray | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether codes are equidistant."""
        return self.levels is None

    @property
    def has_half_shift(self) -> bool:
        """Whether zero lies between two codes, so that 2 · code + 1 is a whole number of half steps."""
        return self.is_uniform and self.shift.size > 0 and bool(np.all(self.shift == HALF))

    @property
    def carries_whole_numbers(self) -> bool:
        """Whether (code + shift) is a whole number of steps or of half steps."""
        return self.is_uniform and (self.has_half_shift or not np.any(self.shift))

    @property
    def scale(self) -> np.ndarray:
        """The product of the scales, of a whole step, float64."""
        return np.asarray(math.prod((x.astype(np.float64) for x in self.scales), start=np.float64(1)))

    def values(self, codes: np.ndarray) -> np.ndarray:
        """Returns what codes stand for, float32."""
        if self.levels is not None:
            places = codes.astype(np.int64) - self.lower
            levels = np.broadcast_to(self.levels, (*codes.shape, self.levels.shape[-1]))
            return np.take_along_axis(levels, places[..., None], axis=-1)[..., 0]
        value = codes.astype(np.float32) + self.shift
        for scale in self.scales:
            value = value * scale
        return value


def carried(codes: Any, decoding: Decoding) -> Any:
    """Returns codes as whole numbers that are multiplied: 2 · code + 1 where zero lies between two codes; int64."""
    codes = np.asarray(codes, np.int64)
    return 2 * codes + 1 if decoding.has_half_shift else codes


def carried_step(decoding: Decoding) -> float:
    """Returns how much of a step one such whole number is."""
    return HALF if decoding.has_half_shift else 1.0


@dataclasses.dataclass(frozen=True)
class Weights:
    """The codes of a kernel.

    Attributes:
        codes: int8 or uint8, in the kernel's own shape.
        decoding: how they stand for values.
    """

    codes: np.ndarray
    decoding: Decoding

    @property
    def packed(self) -> np.ndarray:
        """The codes packed, uint8."""
        return pack(self.codes, self.decoding.bits, self.decoding.lower)

    @property
    def packed_size(self) -> int:
        """Bytes of the packed codes."""
        return packed_size(self.codes.size, self.decoding.bits)

    def values(self) -> np.ndarray:
        """Returns the fake-quantized kernel, float32."""
        return self.decoding.values(self.codes)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How a layer's input becomes codes; all arrays have the stack's axes first.

    Attributes:
        decoding: how codes stand for values; its arrays have no other axes.
        upper: the largest code.
        thresholds: float32 (.., upper - lower), ascending; NaN for one that no number reaches. None if they would be
            many, and the step gives the same codes.
        inverse_step: float32 (..), if clip(round(x · inverse_step)) is the code; else None. Not read where there are
            thresholds.
    """

    decoding: Decoding
    upper: int
    thresholds: np.ndarray | None
    inverse_step: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
    """A quantized layer.

    Attributes:
        kind: its class, such as 'Conv'.
        weight: path of its kernel among the parameters.
        mode: 'integer' if it multiplies codes and scales their sums; 'lookup' if codes become values before.
        weights: None where they stay in full precision.
        inputs: None where they stay in full precision.
        rescale: of integer layers: float32, what sums of codes are multiplied by; the stack's axes first, then the
            output channels' or none.
        largest_sum: of integer layers: a bound of the magnitude of every partial sum.
        largest_kernel_sum: of integer layers: the largest sum of magnitudes of an output channel's codes.
    """

    kind: str
    weight: str
    mode: str
    weights: Weights | None
    inputs: Inputs | None
    rescale: np.ndarray | None = None
    largest_sum: int = 0
    largest_kernel_sum: int = 0


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What happens to images first: (pixel / largest - mean) / std, channel by channel; largest is 1 for floats.

    Attributes:
        mean: in units of the largest pixel.
        std: in the same units.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def values(self, images: np.ndarray) -> np.ndarray:
        """Returns normalized images, float32; uint8 or float32 (.., channels)."""
        largest = np.float32(LARGEST_PIXEL if images.dtype == np.uint8 else 1)
        scaled = images.astype(np.float32) / largest
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def table(self) -> np.ndarray:
        """Returns what each pixel from 0 to 255 becomes, float32 (256, channels)."""
        pixels = np.arange(LARGEST_PIXEL + 1, dtype=np.uint8)
        return self.values(np.repeat(pixels[:, None], len(self.mean), axis=1))


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A trained network as plain arrays.

    Attributes:
        layers: path to quantized layer.
        norms: path to (scale, bias) of a batch norm: y = x · scale + bias, float32 (.., channels).
        floats: path to every other parameter, in full precision.
        collections: {collection: {path: array}}: other variables that the network reads; names in a path are separated
            by `BETWEEN`.
        inputs: shapes and dtypes of one example, a tree of `jax.ShapeDtypeStruct`.
        normalization: what happens to images first; None for other inputs.
        network: what the network is, as JSON, so that it can be built again; None for a module of the user's.
    """

    layers: Mapping[str, FrozenLayer]
    norms: Mapping[str, tuple[np.ndarray, np.ndarray]]
    floats: Mapping[str, np.ndarray]
    collections: Mapping[str, Mapping[str, np.ndarray]]
    inputs: Any
    normalization: Normalization | None = None
    network: Mapping[str, Any] | None = None

    @property
    def float32_size(self) -> int:
        """Bytes of all parameters and batch-norm statistics in float32."""
        codes = sum(layer.weights.codes.size for layer in self.layers.values() if layer.weights is not None)
        norms = sum(2 * (scale.size + bias.size) for scale, bias in self.norms.values())
        return 4 * (codes + norms + sum(x.size for x in self.floats.values()))

    @property
    def ideal_size(self) -> int:
        """Bytes of the packed codes and of what stays in float32, without scales, names and padding."""
        codes = sum(layer.weights.packed_size for layer in self.layers.values() if layer.weights is not None)
        norms = sum(scale.size + bias.size for scale, bias in self.norms.values())
        return codes + 4 * (norms + sum(x.size for x in self.floats.values()))
