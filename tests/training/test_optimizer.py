import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bqat_jax.errors import UserError
from bqat_jax.training.optimizer import OptimizerSpec, Rates, learning_rate_schedule, make_optimizer

PARAMS = {
    'network': {
        'conv': {'kernel': jnp.array([1.0, -2.0])},
        'norm': {'scale': jnp.array([1.0]), 'bias': jnp.array([0.5])},
    },
    'quantizers': {'conv': {'weights': {'step_size': jnp.float32(0.1)}}},
}


def make_spec(quantizers=0.02, decay=0.0, **fields):
    return OptimizerSpec(quantizers=Rates(quantizers, decay), **fields)


def run(spec, gradients, steps=4):
    optimizer, _ = make_optimizer(spec, steps)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(value, gradient, rate, decay, momentum=0.9, steps=4):
    """SGD with L2 regularisation and Nesterov momentum as PyTorch documents it, in float64."""
    value, trace = np.asarray(value, np.float64), 0.0
    for step in range(steps):
        g = gradient + decay * value
        trace = momentum * trace + g
        value = value - rate * 0.5 * (1 + np.cos(np.pi * step / steps)) * (g + momentum * trace)
    return value


def test_each_group_follows_its_own_rule():
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.3), PARAMS)
    params = run(make_spec(weight_decay=0.05, decay=0.01), gradients)
    expected = {
        ('conv', 'kernel'): by_hand([1.0, -2.0], 0.3, 0.1, 0.05),
        ('norm', 'scale'): by_hand([1.0], 0.3, 0.1, 0.0),
        ('norm', 'bias'): by_hand([0.5], 0.3, 0.1, 0.0),
    }
    for (layer, name), want in expected.items():
        np.testing.assert_allclose(params['network'][layer][name], want, rtol=1e-5)
    step = params['quantizers']['conv']['weights']['step_size']
    np.testing.assert_allclose(step, by_hand(0.1, 0.3, 0.02, 0.01), rtol=1e-4)


def test_a_network_without_quantizers_needs_no_learning_rate_for_them():
    optimizer, _ = make_optimizer(OptimizerSpec(quantizers=None), 10)
    params = {'network': PARAMS['network'], 'quantizers': {}}
    optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_one_program_serves_all_learning_rates(name):
    def lower(rate):
        optimizer, learning_rate = make_optimizer(make_spec(rate / 2, name=name, learning_rate=rate), 4)
        state = optimizer.init(PARAMS)
        np.testing.assert_allclose(learning_rate(state, jnp.int32(2)), rate / 2, rtol=1e-6)
        return jax.jit(optimizer.update).lower(PARAMS, state, PARAMS).as_text()

    assert lower(0.1) == lower(0.3)


def test_the_whole_gradient_is_clipped():
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 100.0), PARAMS)
    norm = float(optax.tree.norm(gradients))
    clipped = run(make_spec(clip_norm=1.0, weight_decay=0.0), gradients)
    scaled = run(make_spec(weight_decay=0.0), jax.tree.map(lambda g: g / norm, gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, scaled)


def test_the_schedule_rises_and_decays():
    schedule = learning_rate_schedule(0.4, 100, 10)
    assert [float(schedule(step)) for step in (0, 5, 10, 55, 100)] == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0], abs=1e-7)
    assert float(learning_rate_schedule(0.4, 100, 0)(0)) == pytest.approx(0.4)


def test_a_warm_up_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match='10 steps does not fit into 10'):
        learning_rate_schedule(0.4, 10, 10)


def test_a_step_of_adamw_is_the_formula():
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64; norms do not decay."""
    steps, beta1, beta2, epsilon = 4, 0.8, 0.95, 1e-8
    spec = make_spec(decay=0.01, name='adamw', momentum=beta1, beta2=beta2, weight_decay=0.05)
    gradients = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    params = run(spec, gradients, steps)

    def by_hand(value, rate, decay):
        value = np.asarray(value, np.float64)
        gradient, first, second = 0.3 * value, 0.0, 0.0
        for step in range(steps):
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            unbiased = first / (1 - beta1 ** (step + 1)), second / (1 - beta2 ** (step + 1))
            now = rate * 0.5 * (1 + np.cos(np.pi * step / steps))
            value = value - now * (unbiased[0] / (np.sqrt(unbiased[1]) + epsilon) + decay * value)
        return value

    network = params['network']
    np.testing.assert_allclose(network['conv']['kernel'], by_hand([1.0, -2.0], 0.1, 0.05), rtol=1e-5)
    np.testing.assert_allclose(network['norm']['scale'], by_hand([1.0], 0.1, 0.0), rtol=1e-5)
    np.testing.assert_allclose(network['norm']['bias'], by_hand([0.5], 0.1, 0.0), rtol=1e-5)
    step_size = params['quantizers']['conv']['weights']['step_size']
    np.testing.assert_allclose(step_size, by_hand(0.1, 0.02, 0.01), rtol=1e-4)


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_weight_decay_is_on_kernels_only(name):
    params = {
        'stem': {
            'patch_embed': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
            'class_token': jnp.ones((1, 1, 2)),
            'positions': jnp.ones((1, 3, 2)),
        },
        'norm': {'scale': jnp.ones(2), 'bias': jnp.ones(2)},
    }
    params = {'network': params, 'quantizers': {'step_size': jnp.float32(1.0)}}
    optimizer, _ = make_optimizer(make_spec(name=name, weight_decay=0.5), 4)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {jax.tree_util.keystr(path): bool(jnp.any(x != 0)) for path, x in jax.tree.leaves_with_path(updates)}
    assert [path for path, has in moved.items() if has] == ["['network']['stem']['patch_embed']['kernel']"]


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"optimizer.name='adam': must be one of sgd, adamw"):
        OptimizerSpec(name='adam')
