import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.analysis.measurement import (
    DiagnosisSettings,
    make_feature_measurement,
    make_gradient_measurement,
    make_oscillation_measurement,
    make_quantizer_measurement,
)
from bqat_jax.analysis.measures import decibels, linear_cka, products, relative_error
from bqat_jax.blocks.block_network import other_collections
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.block_replacement import Batch
from bqat_jax.replacement.network_layers import blocks_of_layers, find_network_layers
from bqat_jax.replacement.paths import Variables
from bqat_jax.training.loss import total_loss
from bqat_jax.training.optimizer import OptimizerSpec, make_optimizer
from bqat_jax.training.regularizers import Regularizers
from bqat_jax.training.state import init_state
from tests.training.test_step import NETWORK, VARIABLES, in_full_precision, make_spec

X, Y = (jax.random.normal(jax.random.key(i), (40, 4, 3)) for i in range(2))
BLOCKS = blocks_of_layers(NETWORK, VARIABLES, find_network_layers(NETWORK, VARIABLES))
KEYS = jax.random.split(jax.random.key(2), 3)
BATCHES = [Batch(jax.random.normal(key, (32, 8, 8, 1)), jax.random.randint(key, (32,), 0, 10)) for key in KEYS]


def state_of(spec, quantizers):
    optimizer, _ = make_optimizer(OptimizerSpec(), 5)
    variables = Variables(VARIABLES['params'], quantizers, other_collections(VARIABLES))
    return init_state(spec, jax.random.key(0), variables, optimizer)


def test_vectors_are_compared_as_in_numpy():
    x, y = np.asarray(X, np.float64).ravel(), np.asarray(Y, np.float64).ravel()
    compared = products(X, Y)
    np.testing.assert_allclose(compared.cosine, x @ y / np.linalg.norm(x) / np.linalg.norm(y), rtol=1e-4)
    np.testing.assert_allclose(compared.relative_norm, np.linalg.norm(x) / np.linalg.norm(y), rtol=1e-5)
    np.testing.assert_allclose(relative_error(X, Y), np.linalg.norm(x - y) / np.linalg.norm(y), rtol=1e-5)
    assert float(products(X, jnp.zeros_like(X)).cosine) == 0
    np.testing.assert_allclose(decibels(jnp.float32(1000), jnp.float32(1)), 30, rtol=1e-6)


def test_cka_is_that_of_the_features():
    x, y = (np.asarray(v, np.float64).reshape(40, -1) for v in (X, Y))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.sum((y.T @ x) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    np.testing.assert_allclose(linear_cka(X, Y), expected, rtol=1e-4)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0].astype(np.float32)
    turned = 3 * X.reshape(40, 12) @ rotation + 1
    np.testing.assert_allclose(linear_cka(X, turned), 1, rtol=1e-5)


def test_without_quantizers_all_gradients_are_the_same():
    spec = in_full_precision(make_spec('none', distillation=0.0)[0])
    gradients = make_gradient_measurement(spec, BLOCKS, samples=2)(state_of(spec, {}), VARIABLES, BATCHES)
    for loss in ('lp', 'full'):
        assert list(gradients[loss]['layers']) == list(BLOCKS)
        assert list(gradients[loss]['blocks']) == ['block 1', 'block 2', 'block 3', 'head']
        for measures in (*gradients[loss]['layers'].values(), *gradients[loss]['blocks'].values()):
            for reference in ('full_precision', 'smoothed'):
                np.testing.assert_allclose(measures[f'cosine_to_{reference}'], 1, rtol=1e-4)
                np.testing.assert_allclose(measures[f'relative_norm_to_{reference}'], 1, rtol=1e-4)
            assert measures['variance'] > 0
    assert gradients['lp']['layers']['head/dense'] == pytest.approx(gradients['lp']['blocks']['head'])


def test_the_variance_over_batches_is_that_of_numpy():
    spec = in_full_precision(make_spec('none', distillation=0.0)[0])
    state = state_of(spec, {})
    measured = make_gradient_measurement(spec, BLOCKS, samples=1)(state, VARIABLES, BATCHES)

    def gradient(batch):
        def loss(params):
            variables = Variables(params, {}, state.collections)
            return spec.replacement.loss(variables, None, batch, Context(key=jax.random.key(0)))[0]

        return jax.grad(loss)(VARIABLES['params'])

    kernels = [np.asarray(jax.jit(gradient)(batch)['stage2_block1']['conv1']['kernel']) for batch in BATCHES]
    mean = np.mean(kernels, axis=0)
    expected = sum(np.sum((kernel - mean) ** 2) for kernel in kernels) / 2 / np.sum(mean**2)
    np.testing.assert_allclose(measured['lp']['layers']['stage2_block1/conv1']['variance'], expected, rtol=1e-3)


@pytest.mark.slow
def test_the_whole_loss_is_that_of_training():
    """With dampening and batch-norm groups: the gradients' norm is that of `total_loss`."""
    spec, quantizers = make_spec('none', bits=2)
    regularizers = Regularizers(dampening=50.0, dampening_start=0.0)
    spec = dataclasses.replace(spec, regularizers=regularizers, batch_norm_groups=4)
    state = dataclasses.replace(state_of(spec, quantizers), step=jnp.int32(10))
    path = 'stage2_block1/conv1'
    measured = make_gradient_measurement(spec, BLOCKS, samples=1)(state, VARIABLES, BATCHES[:2])['full']['layers'][path]

    def kernel_gradient(spec, number):
        context = Context(spec.progress(state.step), jax.random.fold_in(state.key, number))

        def loss(params):
            variables = state.variables._replace(params=params)
            return total_loss(spec, variables, VARIABLES, BATCHES[number], context)[0]

        gradients = jax.jit(jax.grad(loss))(VARIABLES['params'])
        return np.asarray(gradients['stage2_block1']['conv1']['kernel'], np.float64)

    gradients = [kernel_gradient(spec, number) for number in range(2)]
    mean = np.mean(gradients, axis=0)
    expected = sum(np.sum((g - mean) ** 2) for g in gradients) / np.sum(mean**2)
    np.testing.assert_allclose(measured['variance'], expected, rtol=1e-3)
    for other in ({'regularizers': Regularizers()}, {'batch_norm_groups': 1}):
        assert not np.allclose(kernel_gradient(dataclasses.replace(spec, **other), 0), gradients[0], rtol=1e-2)


@pytest.mark.slow
def test_two_bits_leave_less_of_the_gradient_than_eight():
    cosines = []
    for bits in (2, 8):
        spec, quantizers = make_spec('prefix', bits=bits)
        gradients = make_gradient_measurement(spec, BLOCKS, samples=2)(
            state_of(spec, quantizers), VARIABLES, BATCHES[:2]
        )
        cosines.append(gradients['lp']['blocks']['block 2'])
        assert gradients['full']['blocks']['block 2']['relative_norm_to_full_precision'] > 0
    for reference in ('full_precision', 'smoothed'):
        low, high = (measures[f'cosine_to_{reference}'] for measures in cosines)
        assert low < high and high > 0.8


def test_features_of_the_same_network_are_the_same():
    spec = in_full_precision(make_spec('none')[0])
    features = make_feature_measurement(spec)(state_of(spec, {}), VARIABLES, BATCHES[:1])
    assert list(features) == ['block 1', 'block 2', 'block 3']
    for measures in features.values():
        assert measures == {'cka': pytest.approx(1, abs=1e-5), 'relative_error': 0}
    spec, quantizers = make_spec('none', bits=2)
    low = make_feature_measurement(spec)(state_of(spec, quantizers), VARIABLES, BATCHES[:1])
    assert all(measures['cka'] < 1 and measures['relative_error'] > 0.1 for measures in low.values())


def test_noise_and_clipping_are_those_of_numpy():
    spec, quantizers = make_spec('none', bits=3)
    noises = make_quantizer_measurement(spec)(state_of(spec, quantizers), BATCHES)
    assert list(noises) == list(BLOCKS)
    kernel = np.asarray(VARIABLES['params']['stage1_block1']['conv2']['kernel'], np.float64)
    step = float(quantizers['stage1_block1/conv2']['weights']['step_size'])
    noise = np.sum((kernel - step * np.clip(np.rint(kernel / step), -4, 3)) ** 2)
    measures = noises['stage1_block1/conv2']['weights']
    np.testing.assert_allclose(measures['snr'], 10 * np.log10(np.sum(kernel**2) / noise), rtol=1e-3)
    assert measures['clipped'] == pytest.approx(np.mean((kernel / step < -4) | (kernel / step > 3)), abs=1e-6)
    images = np.concatenate([np.asarray(images, np.float64) for images, _ in BATCHES])  # the first layer's input
    step = float(quantizers['stem/conv']['activations']['step_size'])
    noise = np.sum((images - step * np.clip(np.rint(images / step), -4, 3)) ** 2)
    measures = noises['stem/conv']['activations']
    np.testing.assert_allclose(measures['snr'], 10 * np.log10(np.sum(images**2) / noise), rtol=1e-3)
    assert measures['clipped'] == pytest.approx(np.mean((images / step < -4) | (images / step > 3)), abs=1e-6)


def test_weights_that_go_back_are_counted_and_others_are_not():
    spec, quantizers = make_spec('none', bits=2)
    name, step = 'stage1_block1', quantizers['stage1_block1/conv1']['weights']['step_size']
    moves = [0.0, 1.0, 0.0, 0.0, 0.0]  # of the first ten weights, in steps; the next ten only go up

    def move(state, number):
        params = jax.tree.map(jnp.copy, state.params)
        kernel = jnp.zeros_like(params['network'][name]['conv1']['kernel']).reshape(-1)
        kernel = kernel.at[:10].set(moves[number] * step).at[10:20].set(min(number, 1) * step)
        shape = params['network'][name]['conv1']['kernel'].shape
        params['network'][name]['conv1']['kernel'] = kernel.reshape(shape)
        return state.replace(params=params)

    state = state_of(spec, quantizers)
    shares = make_oscillation_measurement(spec, move)(move(state, 0), range(1, 5))
    size = VARIABLES['params'][name]['conv1']['kernel'].size
    assert shares['stage1_block1/conv1'] == pytest.approx(10 / size)
    assert shares['stage1_block1/conv2'] == 0


@pytest.mark.parametrize(('name', 'value'), [('batches', 1), ('samples', 0), ('oscillation_steps', -1)])
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(ValueError, match=f'diagnosis.{name}'):
        DiagnosisSettings(**{'batches': 2, 'samples': 1, 'oscillation_steps': 0, name: value})
