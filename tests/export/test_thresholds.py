"""Thresholds give the codes that quantizers give, for every float."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bqat_jax.export.thresholds import encode_by_thresholds, find_thresholds, from_order, order
from bqat_jax.quantizers import QUANTIZERS

FLOATS = st.floats(width=32, allow_nan=False)


def quantizers_of_inputs():
    """Every registered quantizer of activations, at each of its bits, signed or not."""
    for name, cls in QUANTIZERS.entries.items():
        for signed in (True, False):
            for bits in (1, 2, 3, 4):
                try:
                    quantizer, marks = cls(bits, signed, batch_axis=0), [pytest.mark.slow] if bits == 3 else []
                    yield pytest.param(quantizer, id=f'{name}-{bits}-{"s" if signed else "u"}', marks=marks)
                except ValueError:
                    continue


@given(x=FLOATS, y=FLOATS)
def test_places_are_in_the_order_of_floats(x, y):
    assert from_order(order(np.float32(x))) == np.float32(x)
    assert (x < y) == (order(np.float32(x)) < order(np.float32(y)))


@pytest.mark.parametrize('quantizer', [*quantizers_of_inputs()])
def test_thresholds_give_the_codes_of_the_quantizer(quantizer):
    generator = np.random.default_rng(0)
    v = generator.normal(size=(64, 8)).astype(np.float32)
    parameters = quantizer.init(jnp.asarray(v if quantizer.signed else np.abs(v)))

    def encode(x):
        return np.asarray(quantizer.encode(parameters, jnp.asarray(x)))

    thresholds = find_thresholds(encode, quantizer.lower, quantizer.upper)
    assert thresholds.shape == (1, quantizer.upper - quantizer.lower)
    places = order(thresholds[~np.isnan(thresholds)])
    near = from_order(np.concatenate([places - 1, places, places + 1]))
    finite = near[np.isfinite(near)]
    x = np.concatenate([finite, v.ravel(), 100 * v.ravel(), [0.0, -0.0, np.inf, -np.inf]]).astype(np.float32)
    x = np.pad(x, (0, 1100 - x.size), mode='edge')[None]  # few shapes are to be compiled
    np.testing.assert_array_equal(encode_by_thresholds(thresholds, x, quantizer.lower), encode(x))
