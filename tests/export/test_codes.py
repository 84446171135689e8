"""Codes are packed without gaps and come back as they were."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bqat_jax.export.codes import pack, packed_size, unpack, unpack_in_program

RANGES = [(bits, lower) for bits in range(1, 9) for lower in (0, -(2 ** (bits - 1)))]


@pytest.mark.parametrize(('bits', 'lower'), RANGES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_codes_come_back(bits, lower, data):
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7))
    codes = data.draw(hnp.arrays(np.int16, shape, elements=st.integers(lower, lower + 2**bits - 1)))
    packed = pack(codes, bits, lower)
    assert packed.dtype == np.uint8 and packed.size == packed_size(codes.size, bits)
    back = unpack(packed, bits, lower, codes.shape)
    assert back.dtype == (np.int8 if lower < 0 else np.uint8)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(('bits', 'lower'), [(1, 0), (2, -2), (3, -4), (5, 0), (8, -128)])
def test_a_program_unpacks_the_same(bits, lower):
    codes = np.random.default_rng(0).integers(lower, lower + 2**bits, (3, 5))
    got = jax.jit(lambda packed: unpack_in_program(packed, bits, lower, (3, 5)))(pack(codes, bits, lower))
    np.testing.assert_array_equal(got, codes)


def test_the_layout_is_that_of_the_description():
    """Read bit by bit, as a reader in another language would."""
    codes, bits, lower = np.array([3, -4, 0, 2, -1]), 3, -4
    packed = pack(codes, bits, lower)
    whole = sum(int(byte) << (8 * place) for place, byte in enumerate(packed))
    assert [(whole >> (bits * k)) % 2**bits + lower for k in range(codes.size)] == codes.tolist()
    assert whole >> (bits * codes.size) == 0


def test_wrong_codes_and_sizes_are_refused():
    with pytest.raises(ValueError, match='codes from -3 to 1: 2 bits from -2 up hold -2 to 1'):
        pack(np.array([-3, 1]), 2, -2)
    with pytest.raises(ValueError, match='3 bytes for 8 codes of 2 bits'):
        unpack(np.zeros(3, np.uint8), 2, 0, (8,))
    with pytest.raises(ValueError, match='is not an integer from 1 to 8'):
        pack(np.array([0]), 9, 0)
