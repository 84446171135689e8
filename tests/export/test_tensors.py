"""Frozen tensors are the fake-quantized ones bit for bit, for every quantizer that is registered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bqat_jax.export.codes import unpack
from bqat_jax.export.operations import decode, encode
from bqat_jax.export.tensors import freeze_inputs, freeze_weights
from bqat_jax.export.thresholds import from_order, order
from bqat_jax.quantizers import QUANTIZERS, LevelQuantizer, UniformQuantizer
from bqat_jax.transform.layers import KernelLayout, Layer
from bqat_jax.transform.quantization import LayerQuantizers

SHAPE = (3, 3, 2, 4)
INPUT = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
PLAIN = KernelLayout((0, 1, 2, 3))
# (layout, shape): output channels last; next to last, as a transposed convolution has them; several, as a matrix.
LAYOUTS = {
    'last': (PLAIN, SHAPE),
    'transposed': (KernelLayout((0, 1, 3, 2)), SHAPE),
    'matrix': (KernelLayout((0, 1, 2), 2, is_matrix=True), (5, 2, 3)),
    'einsum': (KernelLayout((1, 0, 2), 2, is_matrix=True), (2, 5, 3)),
}


def make(name, bits, **options):
    """The quantizer, or None if it refuses."""
    try:
        return QUANTIZERS.get(name)(bits=bits, **options)
    except ValueError:
        return None


def known(**options):
    found = [make(name, bits, **options) for name in QUANTIZERS for bits in (1, 2, 3, 4, 8)]
    return [pytest.param(x, id=f'{x.name}-{x.bits}') for x in found if x is not None]


def layer(weights=None, activations=None, layout=PLAIN, shape=SHAPE, stack=(), rescale='none'):
    return LayerQuantizers(weights, activations, Layer('Conv', shape, stack, layout, INPUT), rescale)


def kernel_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) * 0.1


def check_weights(own, kernel):
    """Codes, packed and unpacked, decode to what the network computes with."""
    parameters = own.init_weights(kernel)
    weights = freeze_weights(own, parameters, kernel)
    decoding = weights.decoding
    codes = unpack(weights.packed, decoding.bits, decoding.lower, kernel.shape)
    np.testing.assert_array_equal(codes, weights.codes)
    expected = np.asarray(own.quantize_weights(parameters, kernel))
    if not own.layer.stack:  # a vmapped reduction may sum in another order
        np.testing.assert_array_equal(decoding.values(codes), expected)
    np.testing.assert_allclose(decoding.values(codes), expected, rtol=1e-6, atol=1e-9)
    return weights


@pytest.mark.parametrize('quantizer', known())
def test_weights_with_one_scale_come_back_bit_for_bit(quantizer):
    weights = check_weights(layer(quantizer), kernel_of(SHAPE))
    assert weights.decoding.is_uniform == isinstance(quantizer, UniformQuantizer)
    assert weights.packed_size == -(-np.prod(SHAPE) * quantizer.bits // 8)


@pytest.mark.parametrize('quantizer', known(channel_axis=-1))
def test_weights_with_a_scale_for_each_channel_come_back_bit_for_bit(quantizer):
    weights = check_weights(layer(quantizer), kernel_of(SHAPE))
    assert weights.decoding.scales[0].shape == (1, 1, 1, 4)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', ['lsq', 'statsq', 'binary', 'apot', 'lcq'])
def test_kernels_of_every_layout_come_back_bit_for_bit(name, layout):
    own, shape = LAYOUTS[layout]
    bits = 1 if name == 'binary' else 3
    for axis in (None, -1):
        quantizer = make(name, bits, channel_axis=axis)
        if quantizer is not None:
            check_weights(layer(quantizer, layout=own, shape=shape), kernel_of(shape))


@pytest.mark.parametrize('rescale', ['constant', 'stddev'])
@pytest.mark.parametrize('name', ['lsq', 'dorefa', 'ewgs_range', 'nulsq'])
def test_weights_that_are_scaled_again_come_back_bit_for_bit(name, rescale):
    check_weights(layer(make(name, 2), rescale=rescale), kernel_of(SHAPE))


@pytest.mark.parametrize('name', ['lsq', 'statsq', 'binary', 'apot', 'ewgs_range'])
def test_a_stack_is_its_layers(name):
    bits = 1 if name == 'binary' else 2
    for axis in (None, -1):
        quantizer = make(name, bits, channel_axis=axis)
        if quantizer is not None:
            kernel = kernel_of((3, *SHAPE))
            weights = check_weights(layer(quantizer, stack=(3,)), kernel)
            parameters = layer(quantizer, stack=(3,)).init_weights(kernel)
            for number in range(3):
                of_one = jax.tree.map(lambda x: x[number], parameters)  # noqa: B023
                one = freeze_weights(layer(quantizer), of_one, kernel[number])
                np.testing.assert_array_equal(one.values(), weights.values()[number])


def test_a_quantizer_whose_codes_say_something_else_is_refused(registries):
    class Wrong(QUANTIZERS.get('lsq')):
        def encode(self, parameters, v):
            return super().encode(parameters, -v)

    with pytest.raises(ValueError, match='do not decode to the fake-quantized weights'):
        check_weights(layer(Wrong(bits=3)), kernel_of(SHAPE))


def test_a_table_for_each_channel_stands_for_any_quantizer(registries):
    """A quantizer of a user's, neither uniform nor on one set of levels."""

    class Squares(QUANTIZERS.get('lsq')):
        def fake_quantize(self, parameters, v, context=None):
            y = super().fake_quantize(parameters, v)
            return y * jnp.abs(y)

        def decode(self, prepared, codes, dtype=jnp.float32):
            y = super().decode(prepared, codes)
            return (y * jnp.abs(y)).astype(dtype)

    for axis in (None, -1):
        weights = check_weights(layer(Squares(bits=3, channel_axis=axis)), kernel_of(SHAPE))
        assert weights.decoding.levels is not None
        slot = {'levels': weights.decoding.levels}
        got = jax.jit(functools.partial(decode, weights.decoding))(slot, weights.codes.astype(np.float32))
        np.testing.assert_array_equal(got, weights.values())


SIGNS = {'unsigned': False, 'signed': True}
ACTIVATIONS = [
    pytest.param(x.values[0], id=f'{x.id}-{sign}')
    for sign, signed in SIGNS.items()
    for x in known(batch_axis=0, signed=signed)
    if x.values[0].bits in (1, 2, 4, 8)
]


@functools.cache
def frozen_inputs(quantizer):
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    parameters = quantizer.init(jnp.asarray(x if quantizer.signed else np.maximum(x, 0)))
    inputs = freeze_inputs(layer(activations=quantizer), parameters)
    slot = {'shift': inputs.decoding.shift, 'scales': inputs.decoding.scales}
    if inputs.decoding.levels is not None:
        slot = {'levels': inputs.decoding.levels}
    given = {'thresholds': inputs.thresholds, 'inverse_step': inputs.inverse_step}
    slot |= {name: x for name, x in given.items() if x is not None}
    run = jax.jit(lambda x: (codes := encode(inputs, slot, x), decode(inputs.decoding, slot, codes)))
    return parameters, inputs, run


def check_inputs(quantizer, x):
    """A compiled program gives the codes that the quantizer gives eagerly; of two scales it may make one."""
    parameters, _, run = frozen_inputs(quantizer)
    codes, values = run(x)
    np.testing.assert_array_equal(codes, np.asarray(quantizer.encode(parameters, jnp.asarray(x)), np.float32))
    np.testing.assert_allclose(values, quantizer.fake_quantize(parameters, jnp.asarray(x)), rtol=2.5e-7)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize('quantizer', ACTIVATIONS)
@settings(max_examples=10, deadline=None)
@given(x=st.lists(st.one_of(FINITE, st.floats(-8, 8, width=32)), min_size=64, max_size=64))
def test_any_number_gets_the_code_of_the_quantizer(quantizer, x):
    check_inputs(quantizer, np.array(x, np.float32))


@pytest.mark.parametrize('quantizer', ACTIVATIONS)
def test_numbers_beside_thresholds_get_the_code_of_the_quantizer(quantizer):
    _, inputs, _ = frozen_inputs(quantizer)
    assert (inputs.thresholds is not None) or (quantizer.bits > 4 and inputs.inverse_step is not None)
    if inputs.thresholds is None:
        middle = (np.arange(quantizer.lower, quantizer.upper) + 0.5) / inputs.inverse_step
        places = order(middle.astype(np.float32))
    else:
        places = order(inputs.thresholds[~np.isnan(inputs.thresholds)])
    beside = np.concatenate([from_order(places + step) for step in (-2, -1, 0, 1, 2)])
    x = np.resize(beside, -(-beside.size // 64) * 64)  # few shapes are to be compiled
    check_inputs(quantizer, np.concatenate([x, np.array([0.0, -0.0] * 32, np.float32)]))


def test_every_way_of_finding_codes_is_tried():
    seen = [frozen_inputs(x.values[0])[1] for x in ACTIVATIONS]
    assert any(x.thresholds is None for x in seen)
    assert any(x.thresholds is not None and x.inverse_step is None for x in seen)  # n2uq, levels, offsets
    assert any(x.thresholds is not None and x.thresholds.size > 15 for x in seen)
    assert any(not x.decoding.is_uniform for x in seen) and any(x.decoding.has_half_shift for x in seen)
    assert LevelQuantizer in {base for name in QUANTIZERS for base in QUANTIZERS.get(name).__mro__}


def test_scales_of_a_stack_of_inputs_are_those_of_its_layers():
    quantizer = make('lsq', 8, batch_axis=0, signed=True)
    steps = np.array([0.1, 0.2, 0.3], np.float32)
    inputs = freeze_inputs(layer(activations=quantizer, stack=(3,)), {'step_size': jnp.asarray(steps)})
    np.testing.assert_array_equal(inputs.decoding.scales[0], steps)
    np.testing.assert_array_equal(inputs.inverse_step, 1 / steps)
    assert inputs.thresholds is None
