"""Codes of 1 to 8 bits, packed into bytes without gaps.

Element k of the array takes the bits k·b to k·b + b - 1 of the packed bytes, and holds its code minus the smallest
code. Bit n is bit n mod 8 of byte n // 8, counted from the lowest. The last byte is padded with zeros.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.quantizers.grids import check_bits


def packed_size(count: int, bits: int) -> int:
    """Returns the bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int, lower: int) -> np.ndarray:
    """Returns codes packed into bytes, uint8 (packed_size,).

    Args:
        codes: integers from `lower` to lower + 2^bits - 1, of any shape, packed in row-major order.
        bits: 1 to 8.
        lower: the smallest code.

    Raises:
        ValueError: for a code out of range.
    """
    check_bits(bits)
    numbers = np.asarray(codes).astype(np.int64).ravel() - lower
    if numbers.size and (numbers.min() < 0 or numbers.max() >= 2**bits):
        raise ValueError(
            f'codes from {numbers.min() + lower} to {numbers.max() + lower}: {bits} bits from {lower} up hold '
            f'{lower} to {lower + 2**bits - 1}.'
        )
    each = np.unpackbits(numbers.astype(np.uint8)[:, None], axis=1, count=bits, bitorder='little')
    return np.packbits(each.ravel(), bitorder='little')


def unpack(packed: np.ndarray, bits: int, lower: int, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks the result of `pack`, as int8, or uint8 if `lower` is not negative.

    Args:
        packed: uint8 bytes.
        bits: 1 to 8.
        lower: the smallest code.
        shape: shape of the codes.

    Raises:
        ValueError: if the number of bytes does not match.
    """
    _check_size(packed.size, bits, shape)
    count = int(np.prod(shape, dtype=np.int64))
    each = np.unpackbits(packed, count=count * bits, bitorder='little').reshape(count, bits)
    numbers = np.packbits(each, axis=1, bitorder='little')[:, 0] if count else np.zeros(0, np.uint8)
    return (numbers.astype(np.int16) + lower).astype(np.int8 if lower < 0 else np.uint8).reshape(shape)


def unpack_in_program(packed: jax.Array, bits: int, lower: int, shape: tuple[int, ...]) -> jax.Array:
    """Unpacks the result of `pack` within a traced program, as int32; takes the arguments of `unpack`."""
    _check_size(packed.size, bits, shape)
    count = int(np.prod(shape, dtype=np.int64))
    places = jnp.arange(8, dtype=jnp.uint8)
    each = ((packed[:, None] >> places[None, :]) & jnp.uint8(1)).ravel()[: count * bits].reshape(count, bits)
    weights = jnp.left_shift(jnp.int32(1), jnp.arange(bits, dtype=jnp.int32))
    return (jnp.sum(each.astype(jnp.int32) * weights[None, :], axis=1, dtype=jnp.int32) + lower).reshape(shape)


def _check_size(size: int, bits: int, shape: tuple[int, ...]) -> None:
    check_bits(bits)
    count = int(np.prod(shape, dtype=np.int64))
    if size != packed_size(count, bits):
        raise ValueError(
            f'{size} bytes for {count} codes of {bits} bits, of shape {tuple(shape)}: they take '
            f'{packed_size(count, bits)}.'
        )
