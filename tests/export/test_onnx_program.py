"""Models that ONNX export writes: networks, what is folded and stored, names, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.networks import make_network
from tests.networks.test_networks import draw

onnx = pytest.importorskip('onnx', reason='onnx is not installed')
pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')

from bqat_jax.export.onnx_model import OnnxOptions  # noqa: E402
from bqat_jax.export.onnx_program import build_model  # noqa: E402
from tests.export.onnx_models import BATCH, build, check, evaluate, initializers, kinds, operations  # noqa: E402

RANDOM = np.random.default_rng(1)
IMAGE = RANDOM.normal(size=(2, 6, 6, 4)).astype(np.float32)
WHOLE = RANDOM.integers(-8, 8, IMAGE.shape).astype(np.float32)
ROWS = RANDOM.normal(size=(3, 64)).astype(np.float32)
CODES = RANDOM.integers(-8, 8, (64, 64)).astype(np.float32)
NETWORKS = {
    'cifar_resnet': ('cifar_resnet', {'depth': 8, 'width': 4, 'shortcut': 'B'}),
    'cifar_resnet A': ('cifar_resnet', {'depth': 8, 'width': 4, 'shortcut': 'A'}),
    'resnet18': ('resnet', {'depth': 18, 'width': 4}),
    'mobilenet_v2': ('mobilenet_v2', {'width_multiplier': 0.1}),
    'vgg_small': ('vgg_small', {'width': 4}),
    'vit': ('vit', {'size': 'tiny'}),
    'unet': ('unet', {'width': 4, 'levels': 2}),
    'decoder': ('decoder', {'depth': 3, 'width': 8, 'heads': 2}),
}
SHAPES = {'unet': (8, 8, 1), 'decoder': (8,)}


def weights(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def named(shapes):
    generator = np.random.default_rng(2)
    return jax.tree.map_with_path(lambda path, x: np.asarray(draw(path, x, generator), x.dtype), shapes)


def model_of(run, arrays, inputs, **options):
    return build_model(run, arrays, inputs, OnnxOptions(**options))


SLOW = ('cifar_resnet A', 'mobilenet_v2', 'resnet18')  # their operations are those of others, and of modules below


@pytest.mark.parametrize('case', [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in NETWORKS])
def test_networks(case):
    name, options = NETWORKS[case]
    shape = SHAPES.get(case, (32, 32, 3))
    x = RANDOM.normal(size=(2, *shape)).astype(np.float32)
    if case == 'decoder':
        x = RANDOM.integers(0, 50, (2, *shape)).astype(np.int32)
    network = with_inputs(make_network(name, 50, 'stage', options), jax.ShapeDtypeStruct(shape, x.dtype))
    variables = named(jax.eval_shape(lambda: network.init(jax.random.key(0))))

    def run(variables, x):
        return network.apply(variables, x, train=False)[0]

    fast = {'xla_backend_optimization_level': 0}
    wanted = jax.jit(run, compiler_options=fast)(variables, x)
    for size in (BATCH, 2):
        model = model_of(run, variables, jax.ShapeDtypeStruct((size, *shape), x.dtype))
        onnx.checker.check_model(model, full_check=True)
        for optimised in (False, True):
            (result,) = evaluate(model, [x], optimised)
            np.testing.assert_allclose(result, wanted, rtol=2e-5, atol=1e-4)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(2, deterministic=True)(nn.LayerNorm()(x))
        x = x + y
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)), approximate=False))


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=3,
        )
        return layers(name='layers')(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(x.shape[-1], name='dense')(x)), None


class Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(20, 8)
        return embed.attend(embed(tokens))


MODULES = {
    'attention': (Attention(), weights(2, 5, 8)),
    'scan': (Layers(), weights(2, 8)),
    'embedding': (Embedded(), RANDOM.integers(0, 20, (2, 6)).astype(np.int32)),
    'transposed convolution': (nn.ConvTranspose(3, (3, 3), strides=(2, 2)), IMAGE),
    'valid transposed convolution': (nn.ConvTranspose(3, (2, 3), strides=(2, 1), padding='VALID'), IMAGE),
    'grouped convolution': (nn.Conv(8, (3, 3), feature_group_count=2, strides=2), IMAGE),
    'depthwise convolution': (nn.Conv(4, (3, 3), feature_group_count=4, kernel_dilation=2), IMAGE),
    'convolution over lengths': (nn.Conv(3, (3,), padding='CAUSAL'), IMAGE[:, 0]),
    'convolution over volumes': (nn.Conv(3, (2, 2, 2)), IMAGE[..., None]),
    'circular convolution': (nn.Conv(3, (3, 3), padding='CIRCULAR'), IMAGE),
    'group norm': (nn.GroupNorm(2), IMAGE),
    'general dense': (nn.DenseGeneral((2, 3), axis=(1, 2)), IMAGE),
}


@pytest.mark.parametrize('case', MODULES)
def test_modules(case):
    module, x = MODULES[case]
    variables = named(jax.eval_shape(module.init, jax.random.key(0), x))
    leaves, structure = jax.tree.flatten(variables)

    def run(*arrays):
        return module.apply(jax.tree.unflatten(structure, arrays[:-1]), arrays[-1])

    check(run, [x], leaves, tolerance=1e-5)


CONTRACTIONS = {
    'dot': (lambda w, x: x.reshape(-1, 4) @ w, [weights(4, 3)]),
    'dot from the left': (lambda w, x: jnp.einsum('oc,bhwc->bohw', w, x), [weights(3, 4)]),
    'dot over two axes': (lambda w, x: jnp.einsum('bhwc,hwo->boc', x, w), [weights(6, 6, 2)]),
    'vector': (lambda w, x: x @ w, [weights(4)]),
    'batch in the middle': (lambda w, x: jnp.einsum('bhwc,wcd->bhwd', x, w), [weights(6, 4, 3)]),
    'negative padding': (
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), ((-1, 1), (2, -2)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        ),
        [weights(3, 3, 4, 2)],
    ),
    'other layouts': (
        lambda w, x: lax.conv_general_dilated(
            x,
            w,
            (2, 1),
            ((1, 2), (0, 1)),
            lhs_dilation=(1, 3),
            rhs_dilation=(2, 1),
            dimension_numbers=('HNWC', 'OHWI', 'CWNH'),
        ),
        [weights(5, 3, 3, 4)],
    ),
}


@pytest.mark.parametrize('case', CONTRACTIONS)
def test_contractions_are_exact_for_whole_numbers(case):
    function, arrays = CONTRACTIONS[case]
    whole = [np.round(3 * x) for x in arrays]
    symbolics = (False,) if case == 'other layouts' else (False, True)  # the batch is not the first axis
    check(function, [WHOLE], whole, symbolics=symbolics)
    check(function, [IMAGE], arrays, tolerance=3e-6, symbolics=symbolics)


@pytest.mark.parametrize('dtype', [np.int8, np.uint8])
def test_integer_dot(dtype):
    def dot(w, x):
        return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)

    x, w = RANDOM.integers(0, 127, (3, 6)).astype(dtype), RANDOM.integers(0, 127, (6, 20)).astype(dtype)
    check(dot, [x], [w])


def test_sizes_that_follow_the_batch():
    def run(x):
        twice = jnp.concatenate([x, x])
        return twice.reshape(-1, 32) + jnp.zeros((4 * x.shape[0], 32)), jnp.concatenate([twice, x[:1]])

    model = check(run, [ROWS])
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == 'batch'
    assert [x.type.tensor_type.shape.dim[0].dim_param for x in model.graph.output] == ['4*batch', '2*batch + 1']


# --- Codes


@pytest.mark.parametrize(
    ('opset', 'codes', 'kind', 'size'),
    [
        (21, CODES, 'INT4', 2048),
        (21, CODES + 8, 'UINT4', 2048),
        (21, CODES * 15, 'INT8', 4096),
        (21, CODES * 15 + 120, 'UINT8', 4096),
        (21, 2 * CODES + 1, 'INT4', 2048),
        (21, np.sign(CODES + 0.5), 'INT4', 2048),
        (25, np.sign(CODES + 0.5), 'INT2', 1024),
        (25, CODES % 4, 'UINT2', 1024),
        (25, (CODES % 4) * 2 - 3, 'INT2', 1024),
    ],
)
def test_codes_are_stored_small(opset, codes, kind, size):
    scale = np.float32(0.1) * np.arange(1, 65, dtype=np.float32)

    def dense(codes, scale, x):
        return x @ (codes * scale[None])

    model = check(dense, [ROWS], [codes, scale], tolerance=1e-3, opset=opset)
    (stored,) = [x for x in model.graph.initializer if list(x.dims) == [64, 64]]
    assert onnx.TensorProto.DataType.Name(stored.data_type) == kind and len(stored.raw_data) == size
    assert model.ByteSize() < size + 1500


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int32])
def test_codes_of_other_dtypes(dtype):
    codes = (np.abs(CODES) + 1).astype(dtype)

    def dense(codes, x):
        return x @ (codes.astype(jnp.float32) / 8 - 1)

    model = check(dense, [ROWS], [codes], tolerance=1e-3)
    assert 'UINT4' in kinds(model) and 'FLOAT' in kinds(model) and model.ByteSize() < 3500


def test_views_of_codes_stay_codes():
    def run(codes, x):
        kernel = jnp.flip(codes.reshape(8, 8, 8, 8).transpose(3, 2, 1, 0)[1:7], 1)
        return x @ (kernel[:, :, :4].reshape(64, 24) * 0.5)

    model = check(run, [ROWS], [CODES], tolerance=1e-3)
    assert kinds(model).count('INT4') == 1 and 'Transpose' not in operations(model)
    assert model.ByteSize() < 4000


def test_codes_are_read_once():
    model = build(lambda codes, other, x: x @ (codes * 0.5) @ (other * 0.5), [ROWS], [CODES, CODES.copy()])
    assert kinds(model).count('INT4') == 1 and operations(model).count('Cast') == 1


def test_stacked_codes_are_divided():
    stacked = RANDOM.integers(0, 16, (3, 64, 64)).astype(np.float32)

    def run(codes, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ (w * 0.01)), None), x, codes, reverse=True)[0]

    model = check(run, [ROWS], [stacked], tolerance=1e-5)
    assert kinds(model).count('UINT4') == 3 and model.ByteSize() < 3 * 2048 + 2500


def test_what_is_no_code_is_folded():
    def run(w, x):
        return x * (jnp.exp(w) + 1) / 2 + jnp.zeros(64) - 0.0

    with jax.numpy_rank_promotion('allow'):
        model = check(run, [ROWS], [weights(64)])
    assert operations(model) == ['Mul', 'Div']


def test_large_results_are_not_folded():
    model = check(lambda w, x: x[:, :1] + (w[:, None] * w[None, :]).reshape(1, -1), [ROWS], [weights(400)])
    assert model.ByteSize() < 10000


def test_transposes_cancel_and_dead_operations_are_dropped():
    def run(x):
        sorted_x = jnp.sort(x, 1)
        del sorted_x
        return jnp.transpose(jnp.transpose(x, (0, 3, 1, 2)), (0, 2, 3, 1)) + 1

    assert operations(build(run, [IMAGE])) == ['Add']


# --- Names


def test_names_and_metadata():
    shapes = {'image': jax.ShapeDtypeStruct((BATCH, 3), np.float32), 'mask': [jax.ShapeDtypeStruct((BATCH,), np.int32)]}

    def run(arrays, inputs):
        return {'same': inputs['image'], 'twice': [inputs['image'] * 2] * 2, 'constant': arrays + 1.0}

    model = model_of(run, np.float32(2), shapes, metadata={'key': 'value'})
    onnx.checker.check_model(model, full_check=True)
    assert [x.name for x in model.graph.input] == ['input_image', 'input_mask_0']
    names = ['output_constant', 'output_same', 'output_twice_0', 'output_twice_1']
    assert [x.name for x in model.graph.output] == names
    assert [(x.key, x.value) for x in model.metadata_props] == [('key', 'value')]
    assert model.producer_name == 'bqat_jax' and model.ir_version == 10
    x = weights(2, 3)
    for result, own in zip(evaluate(model, [x, np.zeros(2, np.int32)]), [3, x, 2 * x, 2 * x], strict=True):
        np.testing.assert_array_equal(result, own)


def test_single_input_and_output():
    model = model_of(lambda arrays, x: x + 1, (), jax.ShapeDtypeStruct((BATCH, 3), np.float32))
    assert [x.name for x in (*model.graph.input, *model.graph.output)] == ['input', 'output']


def test_observed():
    def layer(x, _):
        checkpoint_name(x.astype(jnp.int32), 'codes:a')  # nothing reads it
        return checkpoint_name(x + 1, 'codes:b'), None

    def run(arrays, x):
        return jax.jit(lambda x: lax.scan(layer, checkpoint_name(x, 'other'), None, length=2)[0])(x) * 2

    shape = jax.ShapeDtypeStruct((2, 3), np.float32)
    assert [x.name for x in model_of(run, (), shape).graph.output] == ['output']
    model = model_of(run, (), shape, observed='codes:')
    onnx.checker.check_model(model, full_check=True)
    assert [x.name for x in model.graph.output] == ['output', 'codes:a@0', 'codes:b@0', 'codes:a@1', 'codes:b@1']
    x = np.ones((2, 3), np.float32)
    for result, number in zip(evaluate(model, [x]), [6, 1, 2, 2, 3], strict=True):
        np.testing.assert_array_equal(result, number * x)


@pytest.mark.parametrize('opset', [21, 22, 23, 24, 25])
def test_opsets(opset):
    check(lambda w, x: nn.softmax(nn.relu(x.reshape(-1, 64) @ w)), [ROWS], [weights(64, 5)], 1e-5, opset=opset)


def test_values_have_shapes():
    model = build(lambda w, x: jnp.tanh(x @ w).sum(1), [ROWS], [weights(64, 5)], symbolic=True)
    described = {x.name for x in (*model.graph.value_info, *model.graph.output)}
    assert {name for node in model.graph.node for name in node.output} == described
    assert len(initializers(model)) == 2


# --- What is refused


class Sorting(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Sorted(name='inner')(x)


class Sorted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.jit(lambda x: jnp.sort(x, 1))(x)


REFUSED = {
    'while': (lambda x: lax.while_loop(lambda y: y.sum() < 5, lambda y: y + 1, x), "operation 'while'"),
    'sort': (lambda x: Sorting().apply({}, x), r"operation 'sort' \(in Sorting/inner"),
    'top_k': (lambda x: lax.top_k(x, 2), "operation 'top_k'.*Export to StableHLO instead"),
    'random': (lambda x: x + jax.random.normal(jax.random.key(x[0, 0].astype(jnp.int32)), (64,))[None], 'random'),
    'cond': (lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), "'cond' whose branch depends on the inputs"),
    'dtype': (lambda x: x.astype(jnp.bfloat16) * 2, 'dtype bfloat16.*float32'),
    'precision': (lambda x: lax.reduce_precision(x, 4, 3), 'to 4 bits of exponent and 3 of mantissa'),
    'shift': (lambda x: lax.shift_left(x.astype(jnp.int32), x.astype(jnp.int32)), 'not constant'),
    'scatter': (lambda x: x.at[:, 0].set(1.0), "operation 'scatter'"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case):
    function, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build(function, [ROWS])


def test_refused_options_and_sizes():
    with pytest.raises(ValueError, match='opsets 21 to 25'):
        OnnxOptions(opset=20)
    a, b = jax.export.symbolic_shape('a,b')
    with pytest.raises(ValueError, match='several unknown sizes'):
        model_of(lambda _, x: x + 1, (), jax.ShapeDtypeStruct((a, b), np.float32))
    with pytest.raises(ValueError, match='cannot compute the size'):
        model_of(lambda _, x: jnp.ones(x.shape[0] ** 2), (), jax.ShapeDtypeStruct((BATCH,), np.float32))
