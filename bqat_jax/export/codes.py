"""Codes of 1 to 8 bits, packed into bytes without gaps.

Code number k, counted from the smallest code, has the bits k·b to k·b + b - 1 of the packed bytes; bit number n is bit
n mod 8 of byte n // 8, the lowest first. The last byte is filled up with zeros.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.quantizers.grids import check_bits


def packed_size(count: int, bits: int) -> int:
    """Returns how many bytes `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int, lower: int) -> np.ndarray:
    """Returns codes packed into bytes, uint8 (packed_size,).

    Args:
        codes: whole numbers from `lower` to lower + 2^bits - 1, of any shape; they are packed row by row.
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
    """Returns the codes that `pack` packed, int8 or, where `lower` is 0 or more, uint8.

    Args:
        packed: uint8 bytes.
        bits: as for `pack`.
        lower: as for `pack`.
        shape: of the codes.

    Raises:
        ValueError: if the bytes are not as many as the codes take.
    """
    _check_size(packed.size, bits, shape)
    count = int(np.prod(shape, dtype=np.int64))
    each = np.unpackbits(packed, count=count * bits, bitorder='little').reshape(count, bits)
    numbers = np.packbits(each, axis=1, bitorder='little')[:, 0] if count else np.zeros(0, np.uint8)
    return (numbers.astype(np.int16) + lower).astype(np.int8 if lower < 0 else np.uint8).reshape(shape)


def unpack_in_program(packed: jax.Array, bits: int, lower: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns what `unpack` does, as operations of a compiled program, int32; arguments as `unpack`."""
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
