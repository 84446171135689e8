"""Quantizers in a traced program, what ONNX export writes for them, and what qonnx makes of that."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bqat_jax.export.qcdq import dequantize_weights, quantize_input

RANDOM = np.random.default_rng(3)
ROWS = RANDOM.normal(size=(3, 64)).astype(np.float32)
IMAGE = RANDOM.normal(size=(2, 6, 6, 4)).astype(np.float32)
BOUNDS = [(-8, 7), (-7, 7), (-1, 1), (-2, 1), (0, 15), (0, 1), (-128, 127), (0, 255), (-127, 127)]


def codes_of(shape, lower, upper):
    return RANDOM.integers(lower, upper + 1, shape).astype(np.float32)


def models():
    pytest.importorskip('onnx', reason='onnx is not installed')
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    from tests.export import onnx_models

    return onnx_models


@pytest.mark.parametrize(('lower', 'upper'), BOUNDS)
def test_quantize_input_in_jax(lower, upper):
    x, step = np.array([-300, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 300], np.float32) / 2, np.float32(0.5)
    wanted = np.clip(np.rint(x / step), lower, upper) * step
    np.testing.assert_array_equal(quantize_input(x, step, lower, upper), wanted)


def test_dequantize_weights_in_jax():
    codes = codes_of((3, 4), -8, 7).astype(np.int8)
    scale = RANDOM.uniform(size=(1, 4)).astype(np.float32)
    np.testing.assert_array_equal(dequantize_weights(codes, scale, -8, 7), codes.astype(np.float32) * scale)


def test_gradients_are_plain():
    gradient = jax.grad(lambda scale: dequantize_weights(codes, scale, -8, 7).sum())
    codes = codes_of((3, 4), -8, 7)
    np.testing.assert_allclose(gradient(np.float32(2)), codes.sum())


@pytest.mark.parametrize(('lower', 'upper'), [(-129, 5), (-1, 128), (0, 256), (1, 5), (-5, 0)])
def test_codes_beyond_8_bits_are_refused(lower, upper):
    with pytest.raises(ValueError, match=f'codes from {lower} to {upper}'):
        quantize_input(ROWS, np.float32(1), lower, upper)
    with pytest.raises(ValueError, match=f'codes from {lower} to {upper}'):
        dequantize_weights(ROWS, np.float32(1), lower, upper)


@pytest.mark.parametrize(('lower', 'upper'), BOUNDS)
def test_quantized_input(lower, upper):
    x = np.concatenate([ROWS, [[-0.25, 0.25, 0.75, 1.25, -1e9, 1e9, -0.75, 0] * 8]]).astype(np.float32)
    model = models().check(lambda x: quantize_input(x, np.float32(0.5), lower, upper), [x])
    clip = [] if (lower, upper) in ((-128, 127), (0, 255)) else ['Clip']
    assert models().operations(model) == ['QuantizeLinear', *clip, 'DequantizeLinear']


def test_input_with_a_computed_step_is_plain():
    model = models().check(lambda x: quantize_input(x, jnp.abs(x).max() / 7, -8, 7), [ROWS], tolerance=1e-6)
    assert 'QuantizeLinear' not in models().operations(model)


def test_observed_codes():
    from bqat_jax.export.onnx_model import OnnxOptions
    from bqat_jax.export.onnx_program import build_model

    def run(_, x):
        return quantize_input(quantize_input(x, np.float32(0.5), -8, 7, 'codes:a'), np.float32(1), 0, 3, 'codes:b')

    shape = jax.ShapeDtypeStruct(ROWS.shape, np.float32)
    model = models()  # skips
    model = build_model(run, (), shape, OnnxOptions(observed='codes:'))
    assert [x.name for x in model.graph.output] == ['output', 'codes:a@0', 'codes:b@0']
    _, first, second = models().evaluate(model, [ROWS])
    assert first.dtype == second.dtype == np.int32
    np.testing.assert_array_equal(first, np.clip(np.rint(ROWS / 0.5), -8, 7))
    np.testing.assert_array_equal(second, np.clip(np.rint(first * 0.5), 0, 3))


SCALES = {
    'one': np.float32(0.1),
    'of outputs': RANDOM.uniform(0.1, 1, (1, 64)).astype(np.float32),
    'of inputs': RANDOM.uniform(0.1, 1, (64, 1)).astype(np.float32),
    'of all': RANDOM.uniform(0.1, 1, (64, 64)).astype(np.float32),
}


@pytest.mark.parametrize('case', SCALES)
@pytest.mark.parametrize(('lower', 'upper'), BOUNDS)
def test_quantized_weights(case, lower, upper):
    scale, codes = SCALES[case], codes_of((64, 64), lower, upper)
    codes.flat[:2] = lower, upper
    # Weights alone, so that they are compared to the bit.
    model = models().check(
        lambda codes, scale, x: x[:1, :1] * 0 + dequantize_weights(codes, scale, lower, upper),
        [ROWS],
        [codes, scale],
        symbolics=(False,),
    )
    assert 'DequantizeLinear' in models().operations(model)
    (stored,) = [x for x in model.graph.initializer if list(x.dims) == [64, 64] and x.data_type != 1]
    assert len(stored.raw_data) == 64 * 64


def test_weights_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match='codes outside -8 to 7'):
        models().build(lambda codes, x: x @ dequantize_weights(codes, 1.0, -8, 7), [ROWS], [codes_of((64, 8), -9, 9)])


@pytest.mark.parametrize(('lower', 'upper'), [(-8, 7), (-128, 127)])
@pytest.mark.parametrize('opset', [21, 25])
def test_views_reach_the_codes(lower, upper, opset):
    scale = RANDOM.uniform(0.1, 1, (1, 1, 1, 16)).astype(np.float32)

    def conv(codes, scale, x):
        kernel = jnp.flip(dequantize_weights(codes, scale, lower, upper), 0)[:, :3].reshape(3, 3, 4, 1, 16)[:, :, :, 0]
        x = quantize_input(x, np.float32(0.1), 0, 255)
        return lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    model = models().check(conv, [IMAGE], [codes_of((3, 4, 4, 16), lower, upper), scale], 1e-3, opset=opset)
    assert models().operations(model).count('Transpose') == 2


MOVES = {
    'transpose': lambda x: x.transpose(0, 3, 1, 2),
    'reshape': lambda x: x.reshape(-1, 4) * 2,
    'slice': lambda x: x[:, 1:3] + 1,
    'strides': lambda x: x[:, ::2, ::-1],
    'pool': lambda x: nn.max_pool(x, (2, 2)),
    'padded pool': lambda x: nn.max_pool(x, (3, 3), padding='SAME'),
    'repeat': lambda x: jnp.repeat(x, 2, axis=1),
    'pad': lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).transpose(0, 3, 1, 2),
    'concatenate': lambda x: jnp.concatenate([x, x], 1)[:, :3],
    'split': lambda x: jnp.split(x, 2, -1),
    'take': lambda x: x[:, np.array([3, 3, 0, 1])],
    'residual': lambda x: x + x.transpose(0, 2, 1, 3),
    'relu': lambda x: nn.relu(x).transpose(0, 3, 1, 2),
    'contraction': lambda x: jnp.einsum('bhwc,bkwc->bhk', x, x),
}


@pytest.mark.parametrize('case', MOVES)
@pytest.mark.parametrize(('lower', 'upper'), [(-8, 7), (-128, 127), (0, 255)])
def test_quantized_inputs_are_moved(case, lower, upper):
    models().check(lambda x: MOVES[case](quantize_input(x, np.float32(1 / 64), lower, upper)), [IMAGE])


def test_merged_axes_of_a_scale():
    scale = RANDOM.uniform(0.1, 1, (1, 8, 1)).astype(np.float32)

    def dense(codes, scale, x):
        return x @ dequantize_weights(codes, scale, -8, 7).reshape(64, 64)

    models().check(dense, [ROWS], [codes_of((8, 8, 64), -8, 7), scale], 1e-4)


class Network(nn.Module):
    """Two convolutions, a block of attention's shape and a head, all of them quantized."""

    @nn.compact
    def __call__(self, x, weights):
        def weight(name):
            codes, scale, bounds = weights[name]
            return dequantize_weights(codes, scale, *bounds)

        conv = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')}
        x = quantize_input(x, np.float32(1 / 128), -128, 127)
        x = nn.relu(lax.conv_general_dilated(x, weight('conv'), (2, 2), 'SAME', **conv))
        x = quantize_input(x, np.float32(0.25), 0, 15)
        y = lax.conv_general_dilated(x, weight('depthwise'), (1, 1), 'SAME', feature_group_count=16, **conv)
        z = quantize_input(x + y, np.float32(0.5), -3, 3)  # the same values again, in other bits
        x = jnp.concatenate([quantize_input(x + y, np.float32(0.5), 0, 7), z], -1).mean((1, 2))
        return quantize_input(x, np.float32(0.125), -2, 1) @ weight('head')


def quantized_network():
    weights = {
        'conv': (codes_of((3, 3, 4, 16), -8, 7), RANDOM.uniform(0.01, 0.1, (1, 1, 1, 16)), (-8, 7)),
        'depthwise': (codes_of((3, 3, 1, 16), -128, 127), RANDOM.uniform(1e-3, 1e-2, (1, 1, 1, 16)), (-128, 127)),
        'head': (codes_of((32, 5), -1, 1), np.array(0.125), (-1, 1)),
    }
    arrays = {name: (codes, np.float32(scale)) for name, (codes, scale, _) in weights.items()}

    def run(arrays, x):
        return Network().apply({}, x, {name: (*arrays[name], weights[name][2]) for name in weights})

    return run, arrays


def test_qonnx_reads_all_quantizers():
    models()
    pytest.importorskip('qonnx', reason='qonnx is not installed')
    import warnings

    from bqat_jax.export.onnx_program import build_model

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.qcdq_to_qonnx import QCDQToQuant

        run, arrays = quantized_network()
        model = build_model(run, arrays, jax.ShapeDtypeStruct(IMAGE.shape, np.float32))
        wrapped = ModelWrapper(model).transform(QCDQToQuant())
        left = [node.op_type for node in wrapped.graph.node]
        quants = [node for node in wrapped.graph.node if node.op_type == 'Quant']
        bits = sorted(float(wrapped.get_initializer(node.input[3])) for node in quants)
        result = execute_onnx(wrapped, {'input': IMAGE})['output']
    assert not {'QuantizeLinear', 'DequantizeLinear', 'Clip'} & set(left)
    # The input of the second convolution is quantized twice: as it is read there, and as it is added.
    assert bits == [2, 2, 3, 3, 4, 4, 4, 8, 8]
    np.testing.assert_allclose(result, run(arrays, IMAGE), rtol=1e-5, atol=1e-5)


def test_quantized_network():
    run, arrays = quantized_network()
    leaves, structure = jax.tree.flatten(arrays)

    def flat(*arrays):
        return run(jax.tree.unflatten(structure, arrays[:-1]), arrays[-1])

    models().check(flat, [IMAGE], leaves, tolerance=1e-4)
