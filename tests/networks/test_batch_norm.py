import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.networks.batch_norm import BatchNorm, batch_norm_in_groups, normalize
from tests.training.test_step import FULL_PRECISION_SPEC, run_steps

X = jnp.asarray(3 * np.random.default_rng(0).normal(size=(12, 5, 5, 4)) + 1, jnp.float32)
NORM = nn.BatchNorm(use_running_average=False, momentum=0.9)
OWN = BatchNorm(use_running_average=False, momentum=0.9)
VARIABLES = {
    'params': {'scale': jnp.arange(1.0, 5.0), 'bias': jnp.arange(4.0)},
    'batch_stats': {'mean': jnp.arange(4.0), 'var': jnp.arange(2.0, 6.0)},
}


def apply(count, x=X, norm=NORM):
    with batch_norm_in_groups(count):
        return norm.apply(VARIABLES, x, mutable=['batch_stats'])


CASES = {
    'usual': X,
    'one example': X[:1],
    'one position': X[:1, 0, 0],
    'no image': X[:, 0, 0],
    'one channel is constant': X.at[..., 1].set(0.3),
    'zeros': 0 * X,
    'far from zero': X + 50,
}
cases = pytest.mark.parametrize('x', CASES.values(), ids=CASES)


def formula(x, scale, bias, epsilon, gradient):
    """The paper's algorithm 1 and its derivatives (section 3), step by step in float64."""
    x, gradient = (np.asarray(v, np.float64).reshape(-1, v.shape[-1]) for v in (x, gradient))
    scale, bias = np.asarray(scale, np.float64), np.asarray(bias, np.float64)
    mean, variance = x.mean(0), x.var(0)
    unit = (x - mean) / np.sqrt(variance + epsilon)
    of_unit = gradient * scale
    of_variance = (of_unit * (x - mean)).sum(0) * -0.5 * (variance + epsilon) ** -1.5
    of_mean = -(of_unit / np.sqrt(variance + epsilon)).sum(0) - 2 * of_variance * (x - mean).mean(0)
    of_x = of_unit / np.sqrt(variance + epsilon) + of_variance * 2 * (x - mean) / len(x) + of_mean / len(x)
    return scale * unit + bias, mean, variance, of_x, (gradient * unit).sum(0), gradient.sum(0)


def tolerance_for(x, epsilon):
    """Variances lose the more the further x is from zero (E[x²] - E[x]², as in Linen), gradients by 1/σ."""
    relative = 1e-5 + 1e-7 * float(jnp.max(x * x))
    largest = float(jnp.max(jax.lax.rsqrt(jnp.var(x, range(x.ndim - 1)) + epsilon)))
    positions = x.size // x.shape[-1]  # over which errors of a sum add up, as their root
    return {'rtol': relative, 'atol': relative * max(1, largest * positions**0.5)}


@cases
def test_values_and_gradients_are_the_papers(x):
    scale, bias = VARIABLES['params'].values()
    gradient = jax.random.normal(jax.random.key(2), x.shape)
    parts = x[None]

    @jax.jit
    def run(*given):
        (y, mean, variance), pullback = jax.vjp(lambda *given: normalize(*given, 1e-3), *given)
        return y, mean, variance, *pullback((gradient[None], jnp.zeros_like(mean), jnp.zeros_like(variance)))

    y, mean, variance, of_x, of_scale, of_bias = run(parts, scale, bias)
    expected = formula(x, scale, bias, 1e-3, gradient)
    tolerance = tolerance_for(x, 1e-3)
    for got, wanted in zip((y, mean, variance, of_x, of_scale, of_bias), expected, strict=True):
        np.testing.assert_allclose(np.asarray(got).reshape(wanted.shape), wanted, **tolerance)


@cases
def test_it_is_linens_layer(x):
    """The same variables, values, stored statistics and gradients."""
    assert jax.tree.map(jnp.shape, OWN.init(jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, NORM.init(jax.random.key(0), x)
    )

    def loss(params, x, norm):
        y, updates = norm.apply({**VARIABLES, 'params': params}, x, mutable=['batch_stats'])
        return jnp.sum(jnp.sin(y)), (y, updates)

    own, linens = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)(VARIABLES['params'], x, norm)
        for norm in (OWN, NORM)
    )
    tolerance = tolerance_for(x, NORM.epsilon)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(linens), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


def test_stored_statistics_are_linens_and_stay():
    own, linens = (layer(use_running_average=True, momentum=0.9) for layer in (BatchNorm, nn.BatchNorm))
    y, updates = apply(1, norm=own)
    np.testing.assert_array_equal(y, apply(1, norm=linens)[0])
    np.testing.assert_array_equal(updates['batch_stats']['mean'], VARIABLES['batch_stats']['mean'])


def test_statistics_that_may_not_change_are_left():
    np.testing.assert_allclose(OWN.apply(VARIABLES, X), apply(1, norm=OWN)[0])


def test_the_second_derivative_is_linens():
    """What measures curvature differentiates twice in reverse."""

    def curvature(x, norm):
        def loss(x):
            return jnp.sum(norm.apply(VARIABLES, x, mutable=['batch_stats'])[0] ** 3)

        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) * jnp.cos(x)))(x)

    own, linens = (np.asarray(jax.jit(curvature, static_argnums=1)(X[:3], norm)) for norm in (OWN, NORM))
    np.testing.assert_allclose(own, linens, atol=1e-4 * np.abs(linens).max())


def test_the_backward_pass_keeps_the_input_alone():
    _, pullback = jax.vjp(lambda x: normalize(x, *VARIABLES['params'].values(), 1e-3), X[None])
    kept = [v for v in jax.tree.leaves(pullback) if v.size == X.size]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], X[None])


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

    np.testing.assert_allclose(*(jax.jit(jax.grad(f))(X) for f in (loss, alone)), rtol=1e-3, atol=2e-3)


def test_stored_statistics_normalise_as_ever():
    norm = nn.BatchNorm(use_running_average=True)
    np.testing.assert_array_equal(apply(3, norm=norm)[0], apply(1, norm=norm)[0])


def test_a_step_on_eight_devices_is_that_of_eight_parts_on_one():
    spec = dataclasses.replace(FULL_PRECISION_SPEC, batch_norm_groups=8)
    one, eight = (run_steps(spec, {}, devices, 3)[1] for devices in (1, 8))
    (whole,) = run_steps(FULL_PRECISION_SPEC, {}, 1, 1)[1]
    assert abs(one[0]['loss'] / whole['loss'] - 1) > 1e-4  # the parts are normalised apart
    for left, right in zip(one, eight, strict=True):
        np.testing.assert_allclose(left['loss'], right['loss'], rtol=1e-4)
        np.testing.assert_allclose(left['l2_gradients'], right['l2_gradients'], rtol=1e-3)
