"""A trained network as plain NumPy arrays with every constant precomputed, which all formats export.

A quantized tensor consists of codes and their decoding, in one of two forms:

    uniform:  value = (code + shift) · scale · ...      rounded to float32 after each operation, from left to right
    levels:   value = levels[code - lower]

An input is encoded in one of two ways:

    thresholds:    code = lower + the number of thresholds that are <= x
    inverse step:  code = clip(round(x · inverse_step), lower, upper), ties to even
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bqat_jax.export.codes import pack, packed_size

# Modes of a layer.
INTEGER, LOOKUP = 'integer', 'lookup'
HALF = 0.5
# Separates the names in a path of another collection; these names may contain a slash.
BETWEEN = '|'
# Integers up to this magnitude, and their sums in any order, are exact in float32.
EXACT_IN_FLOAT32 = 2**24
EXACT_IN_INT32 = 2**31
LARGEST_PIXEL = 255


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The values of codes; arrays have the stack's axes first and broadcast against the codes.

    Attributes:
        bits: 1 to 8.
        lower: the smallest code.
        shift: float32; added to uniform codes.
        scales: float32; factors of uniform codes, multiplied in turn.
        levels: float32 (.., number of levels); None for uniform codes.
    """

    bits: int
    lower: int
    shift: np.ndarray
    scales: tuple[np.ndarray, ...] = ()
    levels: np.ndarray | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether the values are equidistant."""
        return self.levels is None

    @property
    def has_half_shift(self) -> bool:
        """Whether zero lies halfway between two codes, so that a value is 2 · code + 1 half steps."""
        return self.is_uniform and self.shift.size > 0 and bool(np.all(self.shift == HALF))

    @property
    def carries_whole_numbers(self) -> bool:
        """Whether (code + shift) is an integer number of steps or half steps."""
        return self.is_uniform and (self.has_half_shift or not np.any(self.shift))

    @property
    def scale(self) -> np.ndarray:
        """The product of the scales, that is the size of a step, float64."""
        return np.asarray(math.prod((x.astype(np.float64) for x in self.scales), start=np.float64(1)))

    def values(self, codes: np.ndarray) -> np.ndarray:
        """Returns the values of codes, float32."""
        if self.levels is not None:
            places = codes.astype(np.int64) - self.lower
            levels = np.broadcast_to(self.levels, (*codes.shape, self.levels.shape[-1]))
            return np.take_along_axis(levels, places[..., None], axis=-1)[..., 0]
        value = codes.astype(np.float32) + self.shift
        for scale in self.scales:
            value = value * scale
        return value


def carried(codes: Any, decoding: Decoding) -> Any:
    """Returns the integers that stand for codes in products: 2 · code + 1 with a half shift, else the codes; int64."""
    codes = np.asarray(codes, np.int64)
    return 2 * codes + 1 if decoding.has_half_shift else codes


def carried_step(decoding: Decoding) -> float:
    """Returns the unit of `carried` integers, in steps."""
    return HALF if decoding.has_half_shift else 1.0


@dataclasses.dataclass(frozen=True)
class Weights:
    """The codes of a kernel.

    Attributes:
        codes: int8 or uint8, in the kernel's shape.
        decoding: their values.
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
    """The encoding of a layer's input; all arrays have the stack's axes first.

    Attributes:
        decoding: the values of codes; its arrays have no other axes.
        upper: the largest code.
        thresholds: float32 (.., upper - lower), ascending; NaN for one that no number reaches. None if there would be
            many and the step gives equal codes.
        inverse_step: float32 (..), if clip(round(x · inverse_step)) is the code; else None. Unused if there are
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
        mode: 'integer' if it multiplies codes and scales their sums; 'lookup' if it decodes codes first.
        weights: codes of its kernel; None in full precision.
        inputs: encoding of its input; None in full precision.
        rescale: integer layers only: the scale of sums of codes, float32; the stack's axes first, then those of the
            output channels, if any.
        largest_sum: integer layers only: a bound of the magnitude of every partial sum.
        largest_kernel_sum: integer layers only: the largest sum of magnitudes of an output channel's codes.
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
    """The normalization of images: (pixel / largest - mean) / std per channel, with largest = 1 for floats.

    Attributes:
        mean: channel means, in units of the largest pixel.
        std: channel standard deviations, in units of the largest pixel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def values(self, images: np.ndarray) -> np.ndarray:
        """Returns normalized images, float32; uint8 or float32 (.., channels)."""
        largest = np.float32(LARGEST_PIXEL if images.dtype == np.uint8 else 1)
        scaled = images.astype(np.float32) / largest
        return (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def table(self) -> np.ndarray:
        """Returns the normalized values of pixels 0 to 255, float32 (256, channels)."""
        pixels = np.arange(LARGEST_PIXEL + 1, dtype=np.uint8)
        return self.values(np.repeat(pixels[:, None], len(self.mean), axis=1))


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A trained network as plain arrays.

    Attributes:
        layers: quantized layers by path.
        norms: (scale, bias) of batch norms by path: y = x · scale + bias, float32 (.., channels).
        floats: all other parameters by path, in full precision.
        collections: {collection: {path: array}}: other variables that the network reads; names in a path are separated
            by `BETWEEN`.
        inputs: shapes and dtypes of one example, a tree of `jax.ShapeDtypeStruct`.
        normalization: the normalization of images; None for other inputs.
        network: the description from which the network can be rebuilt, as JSON; None for a user's module.
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
        """Bytes of the packed codes and the float32 parameters, without scales, names and padding."""
        codes = sum(layer.weights.packed_size for layer in self.layers.values() if layer.weights is not None)
        norms = sum(scale.size + bias.size for scale, bias in self.norms.values())
        return codes + 4 * (norms + sum(x.size for x in self.floats.values()))
