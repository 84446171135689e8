"""Thresholds of a quantizer: float32 numbers at which its code goes up by one.

With them an input's code is the number of thresholds that it has reached, and no program can round it otherwise: a
compiled division may give another code than an eager one, a comparison cannot.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

# Codes are looked for among all floats but NaN, -inf to +inf.
_FIRST, _LAST = -np.inf, np.inf
# What is encoded is filled up to a multiple of this: JAX compiles an eager `encode` for every shape.
_WIDTH = 16


def find_thresholds(encode: Callable[[np.ndarray], np.ndarray], lower: int, upper: int) -> np.ndarray:
    """Returns ascending thresholds, float32 (channels, upper - lower): code = lower + how many are <= x.

    Found by bisection over the floats in their order, 32 calls of `encode`. A code that no float has makes two equal
    thresholds; one above all codes that occur is NaN, which no number reaches.

    Args:
        encode: from float32 (channels, any) to codes of the same shape; it never goes down as x goes up.
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
    # An end of the line is the threshold itself if its code is there already.
    high = np.where(ends[:, :1] >= codes, order(np.float32(_FIRST)), high)
    return np.where(ends[:, 1:] >= codes, from_order(high), np.float32(np.nan)).astype(np.float32)


def encode_by_thresholds(thresholds: np.ndarray, x: np.ndarray, lower: int) -> np.ndarray:
    """Returns codes, int16, of x, float32 (channels, any), by thresholds, (channels, levels - 1)."""
    return (lower + np.sum(x[..., None] >= thresholds[:, None, :], axis=-1)).astype(np.int16)


def order(x: Any) -> np.ndarray:
    """Returns the places of float32 numbers in their order, int64; neighbours are 1 apart, and -0 is 0."""
    bits = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def from_order(places: np.ndarray) -> np.ndarray:
    """Returns the float32 numbers at places of `order`."""
    magnitude = np.abs(places).astype(np.int32).view(np.float32)
    return np.where(places < 0, -magnitude, magnitude).astype(np.float32)
