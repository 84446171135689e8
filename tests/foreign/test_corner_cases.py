"""Ways to write a network that are allowed, and that a tool which looks at modules from outside can get wrong."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bqat_jax as bq
from bqat_jax.transform.layers import LAYER_TYPES
from tests.foreign.cases import draw_variables

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
KEY = jax.random.key(0)


def bits(number):
    quantizer = {'name': 'lsq', 'bits': number}
    return {'weights': quantizer, 'activations': quantizer}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8)(nn.relu(nn.Dense(8)(x)))


class Blocks(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x):
        for number in range(3):
            x = self.block(name=f'block{number}')(x)
        return nn.Dense(3, name='head')(x)


class JittedCall(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8)(nn.relu(nn.Dense(8)(x)))


@functools.cache
def replaced(block):
    """(logits, quantizers) of a network of such blocks with 8 and with 2 bits."""
    network = bq.split_after(Blocks(block), ['block0', 'block1', 'block2'], (8,))
    variables, runs = draw_variables(network), []
    for number in (8, 2):
        replacement, trained = bq.replace_blocks(network, variables, [X], bits(number), 'prefix')
        runs.append((replacement.logits(trained, X), trained.quantizers))
    return runs


@pytest.mark.parametrize('block', [nn.jit(Block), JittedCall], ids=['class', 'method'])
def test_jitted_modules_are_quantized_as_others(block):
    """JAX traces one of them for all; each has its own quantizers, again in a second preparation."""
    for (expected, wanted), (logits, quantizers) in zip(replaced(Block), replaced(block), strict=True):
        jax.tree.map(np.testing.assert_array_equal, quantizers, wanted)
        np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_a_jitted_function_is_looked_into_again():
    module = Blocks()
    params = module.init(KEY, X)['params']

    def run(params, x):
        return module.apply({'params': params}, x)

    jitted = jax.jit(run)
    jitted(params, X)
    plain, prepared = (bq.prepare(function, params, [X], **bits(4)) for function in (run, jitted))
    jax.tree.map(np.testing.assert_array_equal, plain.quantizers, prepared.quantizers)
    quantized = plain.quantization.quantize_params(plain.quantizers, params)
    with plain.quantization.quantize_inputs():
        np.testing.assert_allclose(jitted(quantized, X), run(quantized, X), atol=1e-6)
    assert np.any(np.asarray(jitted(params, X)) != np.asarray(run(quantized, X)))


class Backwards(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3, reverse=True)
        x, _ = layers(name='layers')(nn.Dense(8, name='first')(x), None)
        return nn.Dense(3)(x)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(8)(x)), None


def test_a_scan_that_runs_backwards_is_not_divided():
    with pytest.raises(ValueError, match='runs backwards'):
        bq.split_after(Backwards(), ['first', 'layers[1]'], (8,))
    network = bq.split_after(Backwards(), ['first', 'layers'], (8,))
    variables = network.init(KEY)
    run = network.bind(variables, train=False).run(X)
    np.testing.assert_array_equal(run.outputs, Backwards().apply(variables, X))


class Noisy(nn.Module):
    training: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.training)(nn.Dense(8)(x))


class HalfSwitched(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = Noisy(name='first')(x)
        return nn.Dense(3)(nn.Dense(8, name='second')(x))


class Merged(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        deterministic = nn.merge_param('deterministic', self.deterministic, deterministic)
        x = nn.Dropout(0.5)(nn.Dense(8, name='first')(x), deterministic=deterministic)
        return nn.Dense(3)(nn.Dense(8, name='second')(x))


def test_a_switch_must_reach_what_it_switches():
    with pytest.raises(ValueError, match=r'In training first/Dropout_0 .Dropout. behaves as in evaluation'):
        bq.split_after(HalfSwitched(), ['first', 'second'], (8,))


def test_a_switch_that_is_field_and_argument_is_given_once():
    network = bq.split_after(Merged(), ['first', 'second'], (8,))
    replacement, variables = bq.replace_blocks(network, network.init(KEY), [X], bits(4))
    batch = bq.Batch(X, jnp.zeros(4, jnp.int32))
    losses = [
        replacement.loss(variables, network.init(KEY), batch, bq.Context(key=jax.random.key(seed)))[0]
        for seed in (1, 2)
    ]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match=r'Context.key=None.: the network draws in training .dropout.'):
        replacement.loss(variables, network.init(KEY), batch, bq.Context())


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
        for name in ('first', 'second', 'head'):
            x = nn.Dense(8, kernel_init=init, name=name)(x)
        return x


def test_boxes_are_taken_off_a_partner():
    network = bq.split_after(Boxed(), ['first', 'second'], np.zeros(8))  # float64, as NumPy has it
    replacement, variables = bq.replace_blocks(network, Boxed().init(KEY, X), [X], bits(4))
    assert replacement.logits(variables, X).shape == (4, 8)


@pytest.mark.parametrize(('inputs', 'message'), [(((8,), (8,)), 'ShapeDtypeStruct'), ((4, 8), 'made for inputs like')])
def test_inputs_that_are_no_example_are_told(inputs, message):
    with pytest.raises(ValueError, match=message):
        network = bq.split_after(Blocks(), ['block0', 'block1'], inputs)
        bq.replace_blocks(network, Blocks().init(KEY, X), [X], bits(4))


def test_ends_are_a_list():
    with pytest.raises(ValueError, match=r"Give a list of paths, \['block0', ...\]"):
        bq.split_after(Blocks(), 'block0', (8,))


class OnlyInTraining(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, name='second')(nn.Dense(8, name='first')(x))
        return nn.Dense(3, name='extra')(x) if train else nn.Dense(3, name='head')(x)


def test_variables_are_there_in_training_and_in_evaluation():
    with pytest.raises(ValueError, match=r'Make all variables in both'):
        bq.split_after(OnlyInTraining(), ['first', 'second'], (8,))


class LowRank(nn.Module):
    @nn.compact
    def __call__(self, x):
        u, v = (self.param(name, nn.initializers.lecun_normal(), (8, 8)) for name in 'uv')
        return x @ u @ v


class WithLowRank(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(LowRank(name='low_rank')(x) @ self.param('own', nn.initializers.lecun_normal(), (8, 8)))


def test_what_a_known_layer_has_beside_its_kernel_is_mentioned(monkeypatch):
    monkeypatch.setitem(LAYER_TYPES, LowRank, bq.transform.layers.LayerType('u'))
    module = WithLowRank()
    params = module.init(KEY, X)['params']
    found = bq.find_layers(lambda params, x: module.apply({'params': params}, x), params, X)
    assert list(found.quantizable) == ['low_rank', 'Dense_0']
    assert found.others['low_rank/v'] == "LowRank has one kernel, 'u'"
    assert 'WithLowRank is the network itself' in found.others['own']


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(8, dtype=jnp.float32, name='dense')
        return nn.Dense(3)(dense(dense(jnp.ones_like(x, jnp.int32)) + x))


def test_a_layer_that_gets_integers_first_has_an_input_to_quantize():
    module = Twice()
    params = module.init(KEY, X)['params']
    found = bq.find_layers(lambda params, x: module.apply({'params': params}, x), params, X)
    assert found.quantizable['dense'].has_input


def test_a_single_layer_is_no_network_with_layers():
    module = nn.Dense(3)
    params = module.init(KEY, X)['params']
    with pytest.raises(ValueError, match='itself a layer, a Dense'):
        bq.find_layers(lambda params, x: module.apply({'params': params}, x), params, X)
