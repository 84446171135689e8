"""A frozen network gives the fake-quantized one's answers, by whatever arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.export import logits_function
from bqat_jax.export.freezing import freeze_layer
from bqat_jax.export.frozen import EXACT_IN_FLOAT32, INTEGER, LOOKUP
from bqat_jax.export.inference import Program, arrays_of
from bqat_jax.export.operations import sum_by_digits
from bqat_jax.export.verification import Run, compare, fake_quantized
from bqat_jax.quantizers import MinMax
from bqat_jax.transform.layers import KernelLayout, Layer
from bqat_jax.transform.quantization import LayerQuantizers
from tests.export.networks import FAMILIES, everything, of_family, of_stranger, of_two
from tests.foreign.cases import CASES

# Some parts of these are the same as others', at a multiple of the cost.
SLOW = ('mobilenet_v2', 'resnet18', 'unet', 'vit', 'vgg_small')


def run_frozen(quantized, arithmetic):
    """Outputs and codes; programs are not optimised (see conftest.py), so that no product and sum are made one."""
    program = Program(quantized.frozen, quantized.network, arithmetic)
    return Run(*jax.jit(program.run_with_codes)(arrays_of(quantized.frozen), quantized.inputs))


def check(quantized):
    """The float32 carrier equals integers; where codes agree with the fake-quantized network's, so do outputs."""
    _, reference = fake_quantized(quantized.network, quantized.quantization, quantized.variables)
    carried, whole = (run_frozen(quantized, arithmetic) for arithmetic in ('float32', 'int8'))
    mask = np.ones(len(jax.tree.leaves(quantized.inputs)[0]), bool)
    assert compare(carried, whole, mask).difference == 0
    assert compare(carried, whole, mask).codes_differ == 0
    agreement = compare(reference(quantized.inputs), carried, mask)
    assert agreement.codes_differ < len(mask)
    assert agreement.relative_difference < 1e-5
    return agreement


@pytest.mark.parametrize('name', [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in FAMILIES])
def test_every_family_gives_the_answers_of_its_fake_quantized_network(name):
    quantized = of_family(name)
    check(quantized)
    kinds = {layer.kind: layer.mode for layer in quantized.frozen.layers.values()}
    assert kinds.pop('Embed', LOOKUP) == LOOKUP
    assert set(kinds.values()) == {INTEGER}


@pytest.mark.parametrize(
    ('weights', 'activations', 'bits', 'weight_bits'),
    [
        pytest.param('lsq', 'lsq', 4, 3, marks=pytest.mark.slow),
        ('lsq', 'lsq_plus', 3, 2),  # offsets, with borders of true zeros
        # Half shifts on both sides, by channel.
        pytest.param('statsq', 'ewgs_range', 2, 2, marks=pytest.mark.slow),
        pytest.param('binary', 'binary', 1, 1, marks=pytest.mark.slow),
        pytest.param('apot', 'nulsq', 4, 4, marks=pytest.mark.slow),  # look-ups
        pytest.param('lcq', 'lsq', 8, 3, marks=pytest.mark.slow),
        pytest.param('lsq', 'minmax', 8, 8, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_layer_gives_the_answers_of_the_fake_quantized_one(weights, activations, bits, weight_bits):
    quantized = everything(weights, activations, bits, weight_bits)
    check(quantized)
    layers = dict(quantized.frozen.layers)
    assert layers.pop('ours').mode == LOOKUP  # nothing is known of what it does
    looks_up = weights in ('apot', 'lcq') or activations == 'nulsq'
    assert {layer.mode for layer in layers.values()} == {LOOKUP if looks_up else INTEGER}


@pytest.mark.slow  # one of them is checked in test_formats.py
@pytest.mark.parametrize('name', CASES)
def test_networks_of_strangers_give_the_answers_of_their_fake_quantized_ones(name):
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        check(of_stranger(name))


def test_sums_beyond_float32_are_put_together_from_digits():
    x = np.random.default_rng(0).integers(0, 256, (2, 5))
    kernel = np.full((5, 3), 2**17 + 1)

    def call(digit):
        sums = np.asarray(digit, np.int64) @ kernel
        assert np.abs(sums).max() < EXACT_IN_FLOAT32
        return jnp.asarray(sums, jnp.float32)

    largest = 2**23 - 1  # of a kernel: digits are single bits
    ones = sum_by_digits(lambda digit: digit * largest, jnp.array([-128.0, 127.0, 0.0, -1.0]), 128, largest)
    np.testing.assert_array_equal(ones, np.float32([-128 * largest, 127 * largest, 0, -largest]))
    for sign in (1, -1):
        got = sum_by_digits(call, jnp.asarray(sign * x, jnp.float32), 255, int(kernel.sum(axis=0).max()))
        np.testing.assert_array_equal(got, (sign * x @ kernel).astype(np.float32))


@pytest.mark.parametrize(
    ('weights', 'activations', 'bits'),
    [
        ('apot', 'nulsq', 4),
        pytest.param('lcq', 'apot', 3, marks=pytest.mark.slow),
        ('binary', 'binary', 1),
        ('statsq', 'n2uq', 2),
    ],
)
def test_every_way_of_multiplying_gives_the_answers_of_the_fake_quantized_network(weights, activations, bits):
    quantized = of_two(16, (weights, bits), (activations, bits))
    check(quantized)
    is_integer = weights in ('binary', 'statsq')
    assert {layer.mode for layer in quantized.frozen.layers.values()} == {INTEGER if is_integer else LOOKUP}


def test_eight_bits_by_eight_are_exact_where_float32_is_not():
    """A wide layer: its sums pass 2^24, and integers and digits agree bit for bit."""
    quantized = of_two(3000, ('minmax', 8), ('minmax', 8))
    layer = quantized.frozen.layers['last']
    assert layer.largest_sum >= EXACT_IN_FLOAT32
    check(quantized)


def test_sums_beyond_32_bits_are_refused():
    quantizers = [MinMax(bits=8, batch_axis=axis) for axis in (None, 0)]
    layer = Layer('Dense', (2**18, 1), (), KernelLayout((0, 1)), jax.ShapeDtypeStruct((1, 2**18), jnp.float32))
    own, step = LayerQuantizers(*quantizers, layer), {'step_size': jnp.float32(1)}
    kernel = {'last/kernel': jnp.full((2**18, 1), 127.0)}
    with pytest.raises(ValueError, match='The layer last: sums of its codes may reach'):
        freeze_layer('last', own, 'last/kernel', kernel, {'weights': step, 'activations': step})


def test_jitted_logits_are_those_of_the_network():
    quantized = of_family('cifar_resnet')
    run, _ = fake_quantized(quantized.network, quantized.quantization, quantized.variables)
    expected = run(quantized.inputs)
    for arithmetic in ('float32', 'int8'):
        got = logits_function(quantized.frozen, quantized.network, arithmetic)(quantized.inputs)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="arithmetic='int4': it must be one of float32, int8"):
        logits_function(quantized.frozen, quantized.network, 'int4')


def test_a_batch_of_one_gives_its_row():
    quantized = of_family('cifar_resnet')
    run = logits_function(quantized.frozen, quantized.network)
    np.testing.assert_allclose(run(quantized.inputs[:1]), run(quantized.inputs)[:1], rtol=1e-6, atol=1e-6)


def test_a_batch_norm_is_the_product_and_sum_of_its_definition():
    """(x - mean) / sqrt(var + epsilon) · scale + bias, in float64."""
    frozen, variables = (quantized := everything('lsq', 'lsq_plus', 3, 2)).frozen, quantized.variables
    params, stats = variables.params['norm'], variables.collections['batch_stats']['norm']
    x = np.random.default_rng(0).normal(size=(5, 6))
    given = (stats['mean'], stats['var'], params['scale'], params['bias'])
    mean, var, scale, bias = (np.asarray(v, np.float64) for v in given)
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    own_scale, own_bias = frozen.norms['norm']
    np.testing.assert_allclose(x * own_scale + own_bias, expected, rtol=1e-6, atol=1e-6)
    assert not any(name.startswith('norm/') for name in frozen.floats)


def test_agreement_counts_examples():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    other = logits + np.array([[0.0, 0.0], [0.5, 0.0], [2.0, 0.0], [0.0, 9.0]])
    codes = {'a': [np.array([[1], [1], [1], [1]])], 'b': [np.zeros((4, 2, 2))]}
    flipped = {'a': [np.array([[1], [1], [2], [1]])], 'b': [np.zeros((4, 2, 2))]}
    mask = np.array([True, True, True, False])
    got = compare(Run(logits, codes), Run(other, flipped), mask)
    assert (got.examples, got.codes_differ, got.answers_differ, got.difference) == (3, 1, 1, 2.0)
    assert got.relative_difference == pytest.approx(0.5 / 3)
    both = got + compare(Run(logits, codes), Run(logits, codes), ~mask)
    assert (both.examples, both.codes_differ, both.difference) == (4, 1, 2.0)
    unseen = compare(Run(logits, codes), Run(other, None), mask)
    assert unseen.codes_differ is None and (got + unseen).codes_differ is None
    nothing = compare(Run(logits, codes), Run(np.full_like(logits, np.nan), codes), mask)
    assert np.isnan((got + nothing).difference) and np.isnan((nothing + got).relative_difference)
    windows = {'a': [np.arange(8).reshape(8, 1)], 'b': [np.zeros((3, 4))]}
    moved = {'a': [np.array([0, 1, 2, 3, 4, 9, 6, 7]).reshape(8, 1)], 'b': [np.zeros((3, 4))]}
    assert compare(Run(logits, windows), Run(logits, moved), mask).codes_differ == 1  # two windows of each example
    moved['b'] = [np.ones((3, 4))]  # examples lie along another axis: it is not known whose code differs
    assert compare(Run(logits, windows), Run(logits, moved), mask).codes_differ == 3
    with pytest.raises(ValueError, match='different layers'):
        compare(Run(logits, codes), Run(other, {'a': codes['a']}), mask)
