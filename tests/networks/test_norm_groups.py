import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.networks.norm_groups import batch_norm_in_groups
from tests.training.test_step import FULL_PRECISION_PROBLEM, run_steps

X = 3 * jax.random.normal(jax.random.key(0), (12, 5, 5, 4)) + 1
NORM = nn.BatchNorm(use_running_average=False, momentum=0.9)
VARIABLES = NORM.init(jax.random.key(1), X)
VARIABLES = {
    'params': {'scale': jnp.arange(1.0, 5.0), 'bias': jnp.arange(4.0)},
    'batch_stats': {'mean': jnp.arange(4.0), 'var': jnp.arange(2.0, 6.0)},
}


def apply(count, x=X, norm=NORM):
    with batch_norm_in_groups(count):
        return norm.apply(VARIABLES, x, mutable=['batch_stats'])


@pytest.mark.parametrize('count', [1, 2, 3, 12])
def test_each_part_is_what_the_layer_makes_of_it_alone(count):
    y, updates = apply(count)
    alone = [NORM.apply(VARIABLES, part, mutable=['batch_stats']) for part in jnp.split(X, count)]
    np.testing.assert_allclose(y, jnp.concatenate([part for part, _ in alone]), rtol=1e-4, atol=1e-4)
    for name in ('mean', 'var'):
        mean = np.mean([stats['batch_stats'][name] for _, stats in alone], axis=0)
        np.testing.assert_allclose(updates['batch_stats'][name], mean, rtol=1e-5)


def test_the_gradient_is_that_of_the_parts():
    def loss(x):
        return jnp.sum(apply(3, x)[0] ** 3)

    def alone(x):
        parts = [NORM.apply(VARIABLES, part, mutable=['batch_stats'])[0] for part in jnp.split(x, 3)]
        return sum(jnp.sum(part**3) for part in parts)

    np.testing.assert_allclose(jax.grad(loss)(X), jax.grad(alone)(X), rtol=1e-3, atol=2e-3)


def test_stored_statistics_normalise_as_ever():
    norm = nn.BatchNorm(use_running_average=True)
    np.testing.assert_array_equal(apply(3, norm=norm)[0], apply(1, norm=norm)[0])


def test_a_step_on_eight_devices_is_that_of_eight_parts_on_one():
    problem = dataclasses.replace(FULL_PRECISION_PROBLEM, batch_norm_groups=8)
    one, eight = (run_steps(problem, {}, devices, 3)[1] for devices in (1, 8))
    (whole,) = run_steps(FULL_PRECISION_PROBLEM, {}, 1, 1)[1]
    assert abs(one[0]['loss'] / whole['loss'] - 1) > 1e-4  # the parts are normalised apart
    for left, right in zip(one, eight, strict=True):
        np.testing.assert_allclose(left['loss'], right['loss'], rtol=1e-4)
        np.testing.assert_allclose(left['l2_gradients'], right['l2_gradients'], rtol=1e-3)
