import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.quantizers.rounding import Context
from bqat_jax.transform import (
    FULL_PRECISION,
    calibrate,
    context_of,
    find_layers,
    find_signed_inputs,
    init_quantizers,
    prepare,
    rescale,
)
from bqat_jax.transform.rules import LayerSettings, QuantizerSettings


class Small(nn.Module):
    """A network that knows nothing of quantization."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name='conv')(x))
        x = nn.Dense(5, name='middle')(x.reshape(x.shape[0], -1))
        return nn.Dense(3, name='last')(inputs=x)


MODEL = Small()
X = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
PARAMS = MODEL.init(jax.random.key(1), X)['params']
WEIGHTS = {'name': 'lsq', 'bits': 4, 'estimator': 'identity'}
ACTIVATIONS = {'name': 'lsq', 'bits': 4, 'estimator': 'identity'}


def run(params, x):
    return MODEL.apply({'params': params}, x)


def quantized(*rules, weights=WEIGHTS):
    return prepare(run, PARAMS, [X], weights=weights, activations=ACTIVATIONS, rules=rules)


def apply(quantization, parameters, params=PARAMS, x=X):
    with quantization.quantize_inputs():
        return run(quantization.quantize_params(parameters, params), x)


def test_layers_are_found_in_the_order_they_run():
    assert tuple(find_layers(run, PARAMS, X).quantizable) == ('conv', 'middle', 'last')


def test_inputs_after_a_relu_are_unsigned():
    quantization, _ = quantized()
    signed = {path: layer.activations.signed for path, layer in quantization.layers.items()}
    assert signed == {'conv': True, 'middle': False, 'last': True}


def test_a_sign_that_is_named_is_taken():
    layer = LayerSettings(None, QuantizerSettings('lsq', 4, 'identity', sign='unsigned'))
    assert find_signed_inputs(run, PARAMS, [X], {}, {'conv': layer}) == {'conv': False}


def test_weights_and_inputs_are_quantized_as_by_hand():
    quantization, parameters = quantized()

    def quantize(path, role, x):
        return getattr(quantization.layers[path], role).fake_quantize(parameters[path][role], x)

    def kernel(path):
        return quantize(path, 'weights', PARAMS[path]['kernel'])

    x = quantize('conv', 'activations', X)
    x = jax.lax.conv_general_dilated(x, kernel('conv'), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    x = jnp.maximum(x + PARAMS['conv']['bias'].reshape(1, 1, 1, -1), 0).reshape(2, -1)
    for path in ('middle', 'last'):
        x = quantize(path, 'activations', x) @ kernel(path) + PARAMS[path]['bias'].reshape(1, -1)
    np.testing.assert_allclose(apply(quantization, parameters), x, rtol=1e-5, atol=1e-6)


def test_layers_without_a_quantizer_stay_as_they_are():
    quantization, parameters = quantized({'layers': 'conv', 'weights': 'none', 'activations': 'none'})
    assert set(parameters) == {'middle', 'last'}
    np.testing.assert_array_equal(
        quantization.quantize_params(parameters, PARAMS)['conv']['kernel'], PARAMS['conv']['kernel']
    )
    np.testing.assert_array_equal(apply(FULL_PRECISION, {}), run(PARAMS, X))


def test_per_channel_weights_have_a_step_per_output_channel():
    _, parameters = quantized(weights={**WEIGHTS, 'granularity': 'channel'})
    shapes = {path: roles['weights']['step_size'].shape for path, roles in parameters.items()}
    assert shapes == {'conv': (4,), 'middle': (5,), 'last': (3,)}


def test_interception_ends_with_its_context():
    quantization, parameters = quantized()
    before = run(PARAMS, X)
    assert not np.array_equal(apply(quantization, parameters), before)
    np.testing.assert_array_equal(run(PARAMS, X), before)


def test_works_inside_a_cond_and_gradients_reach_quantizers():
    quantization, parameters = quantized()

    def loss(params, parameters, flag):
        def low_precision():
            return apply(quantization, parameters, params)

        return jnp.sum(jax.lax.cond(flag, low_precision, lambda: run(params, X)) ** 2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(PARAMS, parameters, True)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradients[1]))
    none = jax.jit(jax.grad(loss, argnums=1))(PARAMS, parameters, False)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(none))


def test_calibration_sees_quantized_inputs_and_averages_batches():
    quantization, parameters = quantized()
    captured = {}

    def record(call, args, kwargs, context):
        if context.module.path == ('middle',):
            captured['x'] = args[0]
        return call(*args, **kwargs)

    quantized_conv = {**PARAMS, 'conv': quantization.quantize_params(parameters, PARAMS)['conv']}
    with nn.intercept_methods(record):
        conv_input = quantization.layers['conv'].activations.fake_quantize(parameters['conv']['activations'], X)
        run(quantized_conv, conv_input)
    expected = quantization.layers['middle'].activations.init(captured['x'])
    np.testing.assert_allclose(parameters['middle']['activations']['step_size'], expected['step_size'], rtol=1e-5)

    both = calibrate(quantization, PARAMS, run, [X, 3 * X])
    single = [init_quantizers(quantization, PARAMS, run, x) for x in (X, 3 * X)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *single)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5), both, mean)


def test_calibration_without_batches_is_refused():
    quantization, _ = quantized()
    with pytest.raises(ValueError, match='at least one batch'):
        calibrate(quantization, PARAMS, run, [])


def test_a_layer_that_does_not_run_is_named():
    quantization, _ = quantized()
    with pytest.raises(ValueError, match='conv'):
        init_quantizers(quantization, PARAMS, lambda params, x: x, X)


def test_every_tensor_draws_for_itself_in_training_and_none_in_evaluation():
    quantization, parameters = quantized(weights={**WEIGHTS, 'estimator': 'stochastic'})
    same = {**PARAMS, 'middle': {**PARAMS['middle'], 'kernel': PARAMS['middle']['kernel'] * 0 + 0.3 * 0.1}}
    parameters = {**parameters, 'middle': {**parameters['middle'], 'weights': {'step_size': jnp.float32(0.1)}}}
    training = [quantization.quantize_params(parameters, same, Context(0.5, jax.random.key(k))) for k in (0, 0, 1)]
    kernels = [np.asarray(params['middle']['kernel']) for params in training]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2]) and set(np.unique(kernels[0])) == {0, np.float32(0.1)}
    np.testing.assert_array_equal(quantization.quantize_params(parameters, same)['middle']['kernel'], 0)
    layer = quantization.layers['middle'].weights
    keys = {
        tuple(jax.random.key_data(context_of(Context(0.5, jax.random.key(0)), path, role, layer).key).tolist())
        for path in ('conv', 'middle')
        for role in ('weights', 'activations')
    }
    assert len(keys) == 4


def test_every_quantizer_gets_its_own_strength():
    quantization, parameters = quantized(weights={**WEIGHTS, 'estimator': 'ewgs_trace'})
    strengths = {path: {'weights': jnp.float32(number)} for number, path in enumerate(('conv', 'middle', 'last'))}
    own = context_of(Context(0.5, None, strengths), 'last', 'weights', quantization.layers['last'].weights)
    assert float(own.strengths) == 2.0 and own.key is None
    assert (
        context_of(
            Context(0.5, None, strengths), 'last', 'activations', quantization.layers['last'].activations
        ).strengths
        is None
    )
    del parameters


@pytest.mark.parametrize('how', ['none', 'constant', 'stddev'])
def test_quantized_weights_are_scaled_again(how):
    quantization, parameters = quantized(weights={**WEIGHTS, 'rescale': how})
    plain, _ = quantized()
    for path in ('conv', 'middle'):
        kernel = PARAMS[path]['kernel']
        got = quantization.quantize_params(parameters, PARAMS)[path]['kernel']
        unscaled = plain.quantize_params(parameters, PARAMS)[path]['kernel']
        wanted = {
            'none': np.std(unscaled),
            'constant': 1 / np.sqrt(kernel.size / kernel.shape[-2]),
            'stddev': np.std(kernel),
        }[how]
        np.testing.assert_allclose(np.std(got), wanted, rtol=1e-5)
        np.testing.assert_allclose(got * (np.std(unscaled) / wanted), unscaled, rtol=1e-4, atol=1e-6)


def test_weights_without_spread_are_not_scaled():
    zeros = jnp.zeros((3, 3, 1, 2))
    for how in ('constant', 'stddev'):
        np.testing.assert_array_equal(rescale(how, zeros, zeros), zeros)


def test_calibration_on_what_is_not_finite_is_refused():
    quantization, _ = quantized()
    with pytest.raises(ValueError, match='activations of layer conv gave no finite scale'):
        calibrate(quantization, PARAMS, run, [X.at[0, 0, 0, 0].set(jnp.nan)])


def test_constrain_goes_to_every_quantizer():
    quantization, parameters = quantized()
    negative = jax.tree.map(lambda x: -x, parameters)
    jax.tree.map(
        lambda got, old: np.testing.assert_allclose(got, 0.5 * old),
        quantization.constrain(negative, parameters),
        parameters,
    )
