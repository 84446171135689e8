"""Integer grids: the integers that b bits hold."""

import dataclasses
from typing import Any

import jax.numpy as jnp

MIN_BITS = 1
MAX_BITS = 8


@dataclasses.dataclass(frozen=True)
class IntegerGrid:
    """The integers that `bits` bits can hold.

    Signed: -2^(b-1) .. 2^(b-1) - 1; unsigned: 0 .. 2^b - 1 (LSQ, arXiv 1902.08153, section 2, which calls the two ends
    -Q_N and Q_P).

    Attributes:
        bits: number of bits, 1 to 8.
        signed: whether the grid has negative integers.
        narrow: omits the lowest integer of a signed grid, which makes the grid symmetric: ternary at 2 bits.

    Raises:
        ValueError: if `bits` is not an integer from 1 to 8.
    """

    bits: int
    signed: bool
    narrow: bool = False

    def __post_init__(self):
        check_bits(self.bits)

    @property
    def lower(self) -> int:
        """The smallest integer of the grid."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def upper(self) -> int:
        """The largest integer of the grid, the Q_P of the LSQ paper."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


def check_bits(bits: Any) -> None:
    """Raises ValueError if `bits` is not an integer from 1 to 8."""
    if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f'bits={bits!r} is not an integer from {MIN_BITS} to {MAX_BITS}. To leave a layer in full precision, use '
            "the quantizer 'none'."
        )


def code_dtype(lower: int):
    """Returns the dtype of codes whose smallest value is `lower`: int8 if negative, else uint8."""
    return jnp.int8 if lower < 0 else jnp.uint8
