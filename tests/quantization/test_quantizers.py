"""LSQ against the paper's formula in float64 NumPy, against PyTorch, and the properties it must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bqat_jax.quantization.quantizers import LSQ, QUANTIZERS, get_quantizer
from bqat_jax.quantization.rounding import ESTIMATORS, IDENTITY, GradientEstimator

BITS = range(2, 9)
CASES = [
    pytest.param(QUANTIZERS[name](bits=bits, signed=signed, channel_axis=axis), id=f'{name}-{bits}-{signed}-{axis}')
    for name in QUANTIZERS
    for bits in BITS
    for signed in (True, False)
    for axis in (None, -1, 0)
]


def hard_inputs(quantizer, parameters, shape=(6, 5, 4)):
    """Random numbers, and among them zeros, ties and the exact bounds of the grid."""
    rng = np.random.default_rng(0)
    step = np.asarray(quantizer._broadcast(parameters['step_size'], len(shape)))
    grid = quantizer.grid
    units = rng.uniform(1.5 * grid.lower - 2, 1.5 * grid.upper + 2, shape)
    special = [
        0.0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        grid.lower,
        grid.upper,
        grid.lower - 0.5,
        grid.upper + 0.5,
        grid.upper - 0.5,
    ]
    units.reshape(-1)[: 3 * len(special)] = special * 3
    return jnp.asarray(units.astype(np.float32) * step)


def some_parameters(quantizer, channels):
    """Powers of two, so that the special inputs are exact."""
    if quantizer.channel_axis is None:
        return {'step_size': jnp.float32(0.25)}
    return {'step_size': jnp.asarray(2.0 ** -(np.arange(channels) % 3), jnp.float32)}


def case(quantizer):
    channels = 4 if quantizer.channel_axis == -1 else 6
    parameters = some_parameters(quantizer, channels)
    return parameters, hard_inputs(quantizer, parameters)


def paper_lsq(v, s, lower, upper, count, g):
    """LSQ, equations 1-3 and section 2.2 of arXiv 1902.08153, in float64 and element by element."""
    v, s, g = (np.asarray(x, np.float64) for x in (v, s, g))
    y, dv, ds = np.zeros_like(v), np.zeros_like(v), np.zeros_like(v)
    for index, value in np.ndenumerate(v):
        step = np.broadcast_to(s, v.shape)[index]
        ratio = value / step
        y[index] = np.rint(min(max(ratio, lower), upper)) * step
        if ratio <= lower:
            ds[index] = lower
        elif ratio >= upper:
            ds[index] = upper
        else:
            dv[index], ds[index] = 1.0, np.rint(ratio) - ratio
    return y, g * dv, g * ds / np.sqrt(count * upper)


@pytest.mark.parametrize('quantizer', CASES)
def test_values_and_gradients_follow_the_paper(quantizer):
    parameters, v = case(quantizer)
    g = jnp.asarray(np.random.default_rng(1).normal(size=v.shape), jnp.float32)
    y, pullback = jax.vjp(quantizer.fake_quantize, parameters, v)
    step_gradient, v_gradient = pullback(g)

    broadcast = np.asarray(quantizer._broadcast(parameters['step_size'], v.ndim))
    count = v.size / parameters['step_size'].size
    expected_y, expected_dv, expected_ds = paper_lsq(v, broadcast, quantizer.grid.lower, quantizer.grid.upper, count, g)
    axes = tuple(a for a in range(v.ndim) if quantizer.channel_axis is None or a != quantizer.channel_axis % v.ndim)
    np.testing.assert_array_equal(y, expected_y.astype(np.float32))
    np.testing.assert_array_equal(v_gradient, expected_dv.astype(np.float32))
    np.testing.assert_allclose(step_gradient['step_size'], expected_ds.sum(axes), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('quantizer', CASES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_fake_quantize_is_decode_of_encode_bit_for_bit(quantizer, dtype):
    parameters, v = case(quantizer)
    v = v.astype(dtype)
    codes = jax.jit(quantizer.encode)(parameters, v)
    assert codes.dtype == (jnp.int8 if quantizer.signed else jnp.uint8)
    assert int(codes.min()) >= quantizer.grid.lower and int(codes.max()) <= quantizer.grid.upper
    fake = jax.jit(quantizer.fake_quantize)(parameters, v)
    assert fake.dtype == dtype
    # assert_array_equal takes -0.0 for 0.0; their bits are the same number to every layer that follows.
    np.testing.assert_array_equal(fake, quantizer.decode(parameters, codes, dtype))


@pytest.mark.parametrize('quantizer', CASES)
def test_is_idempotent_monotone_and_keeps_zero(quantizer):
    parameters, v = case(quantizer)
    y = quantizer.fake_quantize(parameters, v)
    np.testing.assert_array_equal(quantizer.fake_quantize(parameters, y), y)
    np.testing.assert_array_equal(quantizer.fake_quantize(parameters, jnp.zeros_like(v)), jnp.zeros_like(v))
    if quantizer.channel_axis is None:
        ordered = jnp.sort(v.reshape(-1))
        assert bool(jnp.all(jnp.diff(quantizer.fake_quantize(parameters, ordered)) >= 0))


@pytest.mark.parametrize('name', ESTIMATORS)
@pytest.mark.parametrize('channel_axis', [None, -1])
def test_works_under_transformations_and_sharding(name, channel_axis):
    quantizer = LSQ(bits=3, channel_axis=channel_axis, estimator=ESTIMATORS[name])
    v = jax.random.normal(jax.random.key(0), (16, 8))
    parameters = quantizer.init(v)

    def loss(parameters, v):
        return jnp.sum(quantizer.fake_quantize(parameters, v) ** 2)

    grad = jax.grad(loss, argnums=(0, 1))
    expected = grad(parameters, v)
    tight = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(tight, jax.jit(grad)(parameters, v), expected)
    chosen = jax.jit(lambda p, v: jax.lax.cond(True, grad, lambda p, v: (p, v), p, v))(parameters, v)
    jax.tree.map(tight, chosen, expected)
    batched = jax.vmap(grad, in_axes=(None, 0))(parameters, jnp.stack([v, 2 * v]))
    jax.tree.map(lambda got, want: tight(got[0], want), batched, expected)
    mesh = Mesh(np.array(jax.devices()), ('data',))
    sharded = jax.device_put(v, NamedSharding(mesh, PartitionSpec('data')))
    assert len(sharded.sharding.device_set) == 8
    jax.tree.map(tight, jax.jit(grad)(parameters, sharded), expected)


def test_number_of_features_leaves_the_batch_out():
    """With batch_axis the scale is that of one example, so it does not change with the batch size."""
    quantizer = LSQ(bits=2, signed=False, batch_axis=0)
    for batch in (1, 7):
        v = jnp.full((batch, 3, 5), 100.0)  # all clipped: every element gives Q_P
        gradient = jax.grad(lambda p, v=v: jnp.mean(quantizer.fake_quantize(p, v), axis=0).sum())(
            {'step_size': jnp.float32(1)}
        )
        np.testing.assert_allclose(gradient['step_size'], 15 * 3 / np.sqrt(15 * 3), rtol=1e-6)


@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('signed', [True, False])
def test_pytorch_agrees(bits, signed):
    torch = pytest.importorskip('torch', reason='PyTorch, the second witness, is not installed')
    quantizer = LSQ(bits=bits, signed=signed)
    lower, upper = quantizer.grid.lower, quantizer.grid.upper
    v = np.random.default_rng(bits).normal(size=(64, 33)).astype(np.float32)
    v = np.abs(v) if not signed else v
    parameters = quantizer.init(jnp.asarray(v))
    scale = 1 / np.sqrt(v.size * upper)

    s = torch.tensor(float(parameters['step_size']), requires_grad=True)
    x = torch.tensor(v, requires_grad=True)
    ratio = torch.clamp(x * (1 / s), lower, upper)
    y = ((ratio.round() - ratio).detach() + ratio) * s
    (y**2).sum().backward()

    gradients = jax.grad(lambda p, v: jnp.sum(quantizer.fake_quantize(p, v) ** 2), argnums=(0, 1))(
        parameters, jnp.asarray(v)
    )
    np.testing.assert_allclose(gradients[0]['step_size'], scale * s.grad.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[1], x.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_another_estimator_replaces_the_derivative_of_rounding():
    """dy/dv = R'(v/s) inside, dy/ds = round - R' v/s inside: the chain rule, written out."""
    slope = GradientEstimator('slope', lambda g, value, rounded: g * (1 + 0.5 * (value - rounded)))
    quantizer = LSQ(bits=3, estimator=slope)
    v, g = jax.random.normal(jax.random.key(0), (50,)), jax.random.normal(jax.random.key(1), (50,))
    parameters = {'step_size': jnp.float32(0.3)}
    step_gradient, v_gradient = jax.vjp(quantizer.fake_quantize, parameters, v)[1](g)
    u = np.asarray(v, np.float64) / 0.3
    inside = (u > -4) & (u < 3)
    derivative = 1 + 0.5 * (u - np.rint(u))
    np.testing.assert_allclose(v_gradient, np.where(inside, g * derivative, 0), rtol=1e-4, atol=1e-5)
    per_element = np.where(inside, np.rint(u) - derivative * u, np.where(u <= -4, -4, 3))
    np.testing.assert_allclose(step_gradient['step_size'], (g * per_element).sum() / np.sqrt(50 * 3), rtol=1e-4)


@pytest.mark.parametrize('channel_axis', [None, -1, 1])
def test_initial_step_is_the_papers(channel_axis):
    v = jax.random.normal(jax.random.key(0), (5, 6, 7))
    axes = None if channel_axis is None else tuple(a for a in range(3) if a != channel_axis % 3)
    for bits in BITS:
        for signed in (True, False):
            quantizer = LSQ(bits=bits, signed=signed, channel_axis=channel_axis)
            expected = 2 * np.abs(np.asarray(v, np.float64)).mean(axes) / np.sqrt(quantizer.grid.upper)
            np.testing.assert_allclose(quantizer.init(v)['step_size'], expected, rtol=1e-5)


def test_initial_step_of_zeros_is_positive():
    v = jnp.zeros((4, 3)).at[:, 1].set(2.0)
    step = LSQ(bits=2, channel_axis=-1).init(v)['step_size']
    whole = LSQ(bits=2).init(v)['step_size']
    np.testing.assert_allclose(step, [whole, 4.0, whole])
    assert LSQ(bits=2).init(jnp.zeros(3))['step_size'] == 1.0
    assert LSQ(bits=2).init(jnp.full((1, 1), -3.0))['step_size'] == 6.0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=100), st.floats(2**-20, 1e3, width=32))
def test_constrain_keeps_steps_positive(updates, start):
    quantizer = LSQ(bits=2)
    old = {'step_size': jnp.float32(start)}
    for update in updates:
        new = quantizer.constrain({'step_size': old['step_size'] + jnp.float32(update)}, old)
        assert float(new['step_size']) > 0
        assert float(new['step_size']) >= 0.5 * float(old['step_size'])
        old = new


def test_constrain_leaves_ordinary_updates_alone():
    old, new = {'step_size': jnp.array([0.1, 0.2])}, {'step_size': jnp.array([0.06, 0.5])}
    np.testing.assert_array_equal(LSQ(bits=2, channel_axis=0).constrain(new, old)['step_size'], new['step_size'])


@pytest.mark.parametrize('bits', [0, 1, 9, 2.0, '2'])
def test_refuses_bits_that_no_grid_has(bits):
    with pytest.raises(ValueError, match='bits'):
        LSQ(bits=bits)


def test_names_what_there_is():
    with pytest.raises(ValueError, match='lsq'):
        get_quantizer('lsqq')
    assert IDENTITY.name in ESTIMATORS
    with pytest.raises(ValueError, match='batch_axis'):
        LSQ(bits=2, channel_axis=0, batch_axis=0)
