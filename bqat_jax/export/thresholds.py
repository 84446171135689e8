"""Thresholds of a quantizer: float32 numbers at which its code increases by one.

An input's code is the number of thresholds that it reaches. No program can round this differently: a compiled division
may give another code than an eager one, a comparison cannot.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

# The search covers all floats but NaN, from -inf to +inf.
_FIRST, _LAST = -np.inf, np.inf
# Inputs of `encode` are padded to a multiple of this: JAX compiles an eager `encode` for every shape.
_WIDTH = 16


def find_thresholds(encode: Callable[[np.ndarray], np.ndarray], lower: int, upper: int) -> np.ndarray:
    """Returns ascending thresholds, float32 (channels, upper - lower): code = lower + the number that are <= x.

    They are found by bisection over the ordered floats in 32 calls of `encode`. A code that no float has gives two
    equal thresholds; the threshold of a code above all that occur is NaN, which no number reaches.

    Args:
        encode: from float32 (channels, any) to codes of that shape; must be monotonic in x.
        lower: the smallest code.
        upper: the largest code.
    """
    codes = np.arange(lower + 1, upper + 1)
    width = -(-max(codes.size, 2) // _WIDTH) * _WIDTH

    def encode_filled(x):
        return np.asarray(encode(np.pad(x, ((0, 0), (0, width - x.shape[1])), mode='edge')))[:, : x.shape[1]]

    ends = encode_filled(np.array([[_FIRST, _LAST]], np.float32))
    channels = ends.shape[0]
    low = np.full((channels, codes.size), order(np.float32(_FIRST)), np.int64)  # its code is below
    high = np.full((channels, codes.size), order(np.float32(_LAST)), np.int64)  # its code is there or above
    while np.any(high - low > 1):
        middle = (low + high) // 2
        reached = encode_filled(from_order(middle)) >= codes
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    # -inf is the threshold itself if it has the code already.
    high = np.where(ends[:, :1] >= codes, order(np.float32(_FIRST)), high)
    return np.where(ends[:, 1:] >= codes, from_order(high), np.float32(np.nan)).astype(np.float32)


def encode_by_thresholds(thresholds: np.ndarray, x: np.ndarray, lower: int) -> np.ndarray:
    """Returns the codes, int16, of x, float32 (channels, any), for thresholds (channels, levels - 1)."""
    return (lower + np.sum(x[..., None] >= thresholds[:, None, :], axis=-1)).astype(np.int16)


def order(x: Any) -> np.ndarray:
    """Returns the ranks of float32 numbers in ascending order, int64; neighbours differ by 1, and -0 is 0."""
    bits = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def from_order(places: np.ndarray) -> np.ndarray:
    """Returns the float32 numbers for ranks of `order`."""
    magnitude = np.abs(places).astype(np.int32).view(np.float32)
    return np.where(places < 0, -magnitude, magnitude).astype(np.float32)
