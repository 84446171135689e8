"""Quantization from outside reaches every kind of layer, wherever it stands, as quantizing by hand does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.quantizers import QUANTIZERS
from bqat_jax.quantizers.rounding import Context
from bqat_jax.transform import (
    build_quantization,
    calibrate,
    count_macs,
    find_layers,
    init_quantizers,
    prepare,
    quantizer_shapes,
)
from bqat_jax.transform.rules import assign_quantizers

LSQ = {'name': 'lsq', 'bits': 3, 'estimator': 'identity'}
PER_CHANNEL = {**LSQ, 'granularity': 'channel'}


def quantize(module, x, weights=LSQ, activations=LSQ):
    params = module.init(jax.random.key(0), x)['params']

    def run(params, x):
        return module.apply({'params': params}, x)

    return params, *prepare(run, params, [x], weights=weights, activations=activations)


def run_quantized(module, quantization, parameters, params, x, context=None):
    quantized = quantization.quantize_params(parameters, params, *([context] if context else []))
    with quantization.quantize_inputs():
        return module.apply({'params': quantized}, x)


class Wrapped(nn.Module):
    """One layer, called 'layer'."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make(name='layer')(x)


LAYERS = {
    # name: constructor, input shape, output channels, multiply-accumulates of one example
    'Conv': (lambda name: nn.Conv(6, (3, 3), padding='VALID', name=name), (2, 5, 5, 4), 6, 3 * 3 * 9 * 4 * 6),
    'depthwise': (lambda name: nn.Conv(4, (3, 3), feature_group_count=4, name=name), (2, 5, 5, 4), 4, 25 * 9 * 4),
    'ConvTranspose': (lambda name: nn.ConvTranspose(6, (2, 2), (2, 2), name=name), (2, 3, 3, 4), 6, 9 * 4 * 4 * 6),
    'transposed kernel': (
        lambda name: nn.ConvTranspose(6, (2, 2), (2, 2), transpose_kernel=True, name=name),
        (2, 3, 3, 4),
        6,
        9 * 4 * 4 * 6,
    ),
    'Dense': (lambda name: nn.Dense(6, name=name), (2, 3, 4), 6, 3 * 4 * 6),
    'DenseGeneral': (lambda name: nn.DenseGeneral((3, 2), name=name), (2, 5, 4), 6, 5 * 4 * 6),
    'DenseGeneral over two axes': (lambda name: nn.DenseGeneral(6, axis=(-2, -1), name=name), (2, 5, 4), 6, 20 * 6),
    'Einsum': (lambda name: nn.Einsum((2, 4, 3), 'nta,hab->nthb', name=name), (2, 5, 4), 6, 5 * 4 * 6),
}


@pytest.mark.parametrize('name', list(LAYERS))
@pytest.mark.parametrize('weights', [LSQ, PER_CHANNEL], ids=['tensor', 'channel'])
def test_every_kind_of_layer(name, weights):
    make, shape, channels, macs = LAYERS[name]
    module, x = Wrapped(make), jax.random.normal(jax.random.key(1), shape)
    params, quantization, parameters = quantize(module, x, weights)
    layer, kernel = quantization.layers['layer'], params['layer']['kernel']
    steps = parameters['layer']['weights']['step_size']
    examples = x.shape[0]
    assert count_macs(module.apply, {'params': params}, x) == {'layer': examples * macs}
    assert steps.shape == ((channels,) if weights is PER_CHANNEL else ())
    matrix = layer.layer.layout.to_channels_last(kernel)
    assert matrix.shape[-1] == channels
    np.testing.assert_array_equal(layer.layer.layout.from_channels_last(matrix, kernel.shape), kernel)
    by_hand = layer.layer.layout.from_channels_last(
        layer.weights.fake_quantize(parameters['layer']['weights'], matrix), kernel.shape
    )
    seen = layer.activations.fake_quantize(parameters['layer']['activations'], x)
    expected = module.apply({'params': {'layer': {**params['layer'], 'kernel': by_hand}}}, seen)
    np.testing.assert_array_equal(run_quantized(module, quantization, parameters, params, x), expected)


@pytest.mark.parametrize('name', list(LAYERS))
def test_a_scale_per_channel_is_a_scale_per_output_channel(name):
    """Scaling what makes one output channel scales that channel's step, and no other."""
    make, shape, channels, _ = LAYERS[name]
    module, x = Wrapped(make), jnp.ones(shape)
    params = module.init(jax.random.key(0), x)['params']
    layout = find_layers(lambda p, x: module.apply({'params': p}, x), params, x).quantizable['layer'].layout
    kernel = params['layer']['kernel']
    matrix = layout.to_channels_last(kernel)
    scaled = layout.from_channels_last(matrix.at[..., 0].multiply(3), kernel.shape)
    bias = params['layer'].get('bias')
    no_bias = {} if bias is None else {'bias': jnp.zeros_like(bias)}
    before, after = (module.apply({'params': {'layer': {'kernel': k, **no_bias}}}, x) for k in (kernel, scaled))
    before, after = (np.asarray(y).reshape(-1, channels) for y in (before, after))
    np.testing.assert_allclose(after[:, 0], 3 * before[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after[:, 1:], before[:, 1:])


class Block(nn.Module):
    """A block as a user of scan writes it."""

    features: int = 4

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.relu(nn.Dense(self.features, name='dense')(x)), None


class Loop(nn.Module):
    """Three blocks, one after another."""

    @nn.compact
    def __call__(self, x):
        for number in range(3):
            x, _ = Block(name=f'block{number}')(x)
        return nn.Dense(2, name='head')(x)


class Scanned(nn.Module):
    """The same three blocks under `nn.scan`, their parameters stacked."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
        x, _ = stack(name='blocks')(x, None)
        return nn.Dense(2, name='head')(x)


class Rematerialised(nn.Module):
    """The same under `nn.scan` and `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(nn.remat(Block), variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
        x, _ = stack(name='blocks')(x, None)
        return nn.Dense(2, name='head')(x)


@pytest.mark.parametrize('role', ['weights', 'activations'])
@pytest.mark.parametrize('name', list(QUANTIZERS))
def test_shapes_of_quantizers_are_those_of_their_start(name, role):
    """In a stack and outside of one; checkpoints are read by these shapes."""
    module, x = Scanned(), jnp.ones((8, 4))
    params = module.init(jax.random.key(0), x)['params']

    def run(params, x):
        return module.apply({'params': params}, x)

    layers = find_layers(run, params, x).quantizable
    settings = {'weights': LSQ, 'activations': LSQ, role: {'name': name, 'bits': 1 if name == 'binary' else 2}}
    try:
        quantization = build_quantization(
            layers, assign_quantizers(tuple(layers), **settings, rules=()), dict.fromkeys(layers, False)
        )
    except ValueError as error:
        pytest.skip(f'{name} is none of {role}: {error}')
    started = jax.eval_shape(lambda params, x: init_quantizers(quantization, params, run, x), params, x)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), quantizer_shapes(quantization, params)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), started
    )


@pytest.mark.parametrize('module', [Scanned(), Rematerialised()], ids=['scan', 'scan of remat'])
@pytest.mark.parametrize('weights', [LSQ, PER_CHANNEL], ids=['tensor', 'channel'])
def test_every_layer_of_a_stack_is_quantized_on_its_own(module, weights):
    x = jax.random.normal(jax.random.key(1), (8, 4))
    params, quantization, parameters = quantize(module, x, weights)
    loop = Loop()
    loop_params = {'head': params['head']}
    for number in range(3):
        loop_params[f'block{number}'] = jax.tree.map(lambda leaf, number=number: leaf[number], params['blocks'])
    _, loop_quantization, _ = quantize(loop, x, weights)

    def run(params, x):
        return loop.apply({'params': params}, x)

    loop_parameters = calibrate(loop_quantization, loop_params, run, [x])
    got = parameters['blocks/dense']
    assert quantization.layers['blocks/dense'].layer.stack == (3,)
    for number in range(3):
        for role in ('weights', 'activations'):
            expected = loop_parameters[f'block{number}/dense'][role]['step_size']
            np.testing.assert_allclose(got[role]['step_size'][number], expected, rtol=1e-6)
    expected = run_quantized(loop, loop_quantization, loop_parameters, loop_params, x)
    np.testing.assert_allclose(run_quantized(module, quantization, parameters, params, x), expected, rtol=1e-5)
    assert count_macs(module.apply, {'params': params}, x) == {'blocks/dense': 8 * 3 * 4 * 4, 'head': 8 * 4 * 2}

    def loss(parameters):
        return jnp.sum(run_quantized(module, quantization, parameters, params, x) ** 2)

    gradients = jax.jit(jax.grad(loss))(parameters)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(gradients['blocks/dense']['activations']))


def test_the_layers_of_a_stack_draw_differently():
    x = jnp.ones((8, 4))
    stochastic = {**LSQ, 'estimator': 'stochastic'}
    params, quantization, parameters = quantize(Scanned(), x, stochastic, stochastic)
    same = {**params, 'blocks': jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.033), params['blocks'])}
    parameters['blocks/dense']['weights']['step_size'] = jnp.full(3, 0.1)
    quantized = quantization.quantize_params(parameters, same, Context(0.5, jax.random.key(0)))
    kernel = np.asarray(quantized['blocks']['dense']['kernel'])
    assert not np.array_equal(kernel[0], kernel[1]) and set(np.unique(kernel)) == {0, np.float32(0.1)}
    out = run_quantized(Scanned(), quantization, parameters, same, x, Context(0.5, jax.random.key(0)))
    assert np.all(np.isfinite(out))


def test_strengths_are_not_measured_in_a_stack():
    with pytest.raises(ValueError, match="blocks/dense: the estimator 'ewgs_trace'"):
        quantize(Scanned(), jnp.ones((8, 4)), {**LSQ, 'estimator': 'ewgs_trace'})


class Shared(nn.Module):
    """One layer called twice."""

    def setup(self):
        self.layer = nn.Dense(4)

    def __call__(self, x):
        return self.layer(nn.relu(self.layer(x)))


def test_a_layer_called_twice_has_one_quantizer_and_sees_both_inputs():
    x = jax.random.normal(jax.random.key(1), (8, 4))
    params, quantization, parameters = quantize(Shared(), x)
    layer = quantization.layers['layer']
    assert layer.activations.signed
    assert count_macs(Shared().apply, {'params': params}, x) == {'layer': 8 * 2 * 16}
    kernel = layer.weights.fake_quantize(parameters['layer']['weights'], params['layer']['kernel'])

    def dense(x):
        return x @ kernel + params['layer']['bias'].reshape(1, -1)

    first = layer.activations.init(x)
    second = layer.activations.init(nn.relu(dense(layer.activations.fake_quantize(first, x))))
    mean = (first['step_size'] + second['step_size']) / 2
    np.testing.assert_allclose(parameters['layer']['activations']['step_size'], mean, rtol=1e-5)


def test_attention_is_reached_through_its_projections():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    params, quantization, parameters = quantize(module, x, PER_CHANNEL)
    assert set(quantization.layers) == {'query', 'key', 'value', 'out'}
    assert all(roles['weights']['step_size'].shape == (8,) for roles in parameters.values())
    assert np.all(np.isfinite(run_quantized(module, quantization, parameters, params, x)))
    macs = count_macs(module.apply, {'params': params}, x)
    assert macs == {**dict.fromkeys(('query', 'key', 'value', 'out'), 2 * 5 * 8 * 8), '': 2 * 2 * 5 * 5 * 8}


class Norm(nn.Module):
    """A norm as scan wants it."""

    @nn.compact
    def __call__(self, x, _):
        return nn.LayerNorm(name='inner')(x), None


class Odd(nn.Module):
    """Weights that no layer owns."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name='dense')(x)
        x = x @ self.param('matrix', nn.initializers.normal(), (4, 4))
        norms = nn.scan(Norm, variable_axes={'params': 0}, split_rngs={'params': True}, length=2)
        return norms(name='norms')(nn.LayerNorm(name='norm')(x), None)[0]


class StackedElsewhere(nn.Module):
    """Parameters stacked along the second axis."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={'params': 1}, split_rngs={'params': True}, length=3)
        return stack(name='blocks')(x, None)[0]


def test_what_is_not_reached_is_named():
    for module, others in ((Odd(), {'matrix'}), (StackedElsewhere(), {'blocks/dense/kernel'})):
        x = jnp.ones((2, 4))
        params = module.init(jax.random.key(0), x)['params']
        layers = find_layers(lambda params, x, module=module: module.apply({'params': params}, x), params, x)
        assert set(layers.others) == others
    assert 'leading axes' in layers.others['blocks/dense/kernel']


def test_parameters_that_were_not_quantized_are_refused():
    x = jnp.ones((2, 4))
    params, quantization, _ = quantize(Shared(), x)
    with quantization.quantize_inputs(), pytest.raises(ValueError, match='quantize_params'):
        Shared().apply({'params': params}, x)
