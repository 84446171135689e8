import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.quantization.rounding import ESTIMATORS, get_estimator, round_with_estimator

VALUES = jnp.array([-2.5, -1.5, -0.5, -0.49, -0.0, 0.0, 0.5, 1.5, 2.5, 3.2, 1e6])


@pytest.mark.parametrize('name', ESTIMATORS)
def test_forward_is_rounding_to_nearest_even(name):
    rounded = round_with_estimator(get_estimator(name), VALUES)
    np.testing.assert_array_equal(rounded, np.rint(np.asarray(VALUES, np.float64)))
    assert rounded.dtype == VALUES.dtype


@pytest.mark.parametrize('name', ESTIMATORS)
def test_backward_is_the_estimators_rule(name):
    estimator = get_estimator(name)
    g = jax.random.normal(jax.random.key(0), VALUES.shape)
    (got,) = jax.vjp(lambda value: round_with_estimator(estimator, value), VALUES)[1](g)
    np.testing.assert_array_equal(got, estimator.backward(g, VALUES, jnp.round(VALUES)))
    assert bool(jnp.all(jnp.isfinite(got)))


def test_identity_passes_the_gradient_on():
    gradient = jax.grad(lambda value: jnp.sum(3.0 * round_with_estimator(get_estimator('identity'), value)))(VALUES)
    np.testing.assert_array_equal(gradient, np.full(VALUES.shape, 3.0))


def test_names_what_there_is():
    with pytest.raises(ValueError, match=r"'identiy'.*identity"):
        get_estimator('identiy')
