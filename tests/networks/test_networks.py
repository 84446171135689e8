"""What every network of the registry promises."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.blocks.chain import CUTS
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.networks.layers import DTYPES
from bqat_jax.networks.mobilenet_v2 import make_divisible
from bqat_jax.networks.registry import NETWORKS, make_network
from bqat_jax.transform import count_macs

# Name of a network in the tests, to its name in the registry and to options that make it small.
SMALL = {
    'cifar_resnet': ('cifar_resnet', {'depth': 8, 'width': 4, 'shortcut': 'B'}),
    'mobilenet_v2': ('mobilenet_v2', {'width_multiplier': 0.1}),
    'resnet18': ('resnet', {'depth': 18, 'width': 4}),
    'resnet50': ('resnet', {'depth': 50, 'width': 2}),
    'vgg_small': ('vgg_small', {'width': 4}),
    'vit': ('vit', {'size': 'tiny'}),
}
# Blocks by the cuts 'stage' and 'block'.
NUMBER_OF_BLOCKS = {
    'cifar_resnet': (3, 3),
    'mobilenet_v2': (7, 17),
    'resnet18': (4, 8),
    'resnet50': (4, 16),
    'vgg_small': (3, 5),
    'vit': (4, 12),
}
NUM_CLASSES, IMAGE_SHAPE = 10, (32, 32, 3)
X = np.asarray(jax.random.normal(jax.random.key(1), (4, *IMAGE_SHAPE)))


def small(case, cut='stage', **options):
    name, small_options = SMALL[case]
    return make_network(name, NUM_CLASSES, cut, {**small_options, **options})


def small_with_inputs(case, cut='stage', **options):
    """A network that can be run block by block."""
    return with_inputs(small(case, cut, **options), IMAGE_SHAPE)


# What runs once needs no fast code.
quick_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def draw(path, leaf, generator):
    """Values like those of a trained network: nothing is zero or one."""
    name = path[-1].key
    if name == 'kernel':
        return generator.normal(size=leaf.shape) * (2 / np.prod(leaf.shape[:-1])) ** 0.5
    if name in ('scale', 'var'):
        return generator.uniform(0.5, 1.5, leaf.shape)
    return generator.normal(size=leaf.shape) * 0.1


@functools.cache
def drawn(case):
    """Variables, of NumPy: what is kept must not be an array of the trace in which it is first asked for."""
    shapes = jax.eval_shape(lambda: small(case).init(jax.random.key(0), IMAGE_SHAPE))
    generator = np.random.default_rng(0)
    return jax.tree.map_with_path(lambda path, leaf: np.asarray(draw(path, leaf, generator), leaf.dtype), shapes)


def compose(network, variables, x, train):
    """Runs a network's blocks from the first cut on, and its head, one after another."""
    bound = network.bind(variables, train=train)
    alive = bound.run(x).alive[0]
    for number in range(1, len(network.blocks)):
        alive = bound.run_pieces(number, number, alive)
    return bound.run_pieces(len(network.blocks), len(network.blocks), alive)


@functools.cache
def logits(case, dtype):
    network = small(case, dtype=dtype)
    return quick_jit(lambda variables, x: network.apply(variables, x, train=False)[0])(drawn(case), X)


@functools.cache
def loss_and_gradients(case, remat, train=True):
    network, variables = small(case, remat=remat), drawn(case)

    def loss(params):
        logits, _ = network.apply({**variables, 'params': params}, X, train=train)
        return jnp.mean(-jax.nn.log_softmax(logits)[:, 0])

    return quick_jit(jax.value_and_grad(loss))(variables['params'])


def all_but_slow(*slow):
    """Every case, those marked that take longest to compile."""
    return [pytest.param(case, marks=[pytest.mark.slow] if case in slow else []) for case in SMALL]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_every_network_of_the_registry_is_tested():
    ours = {name for name, make in NETWORKS.entries.items() if make.__module__.startswith('bqat_jax.')}
    others = {'decoder', 'unet'}  # which have files of their own
    assert {name for name, _ in SMALL.values()} | others == ours


@pytest.mark.parametrize('cut', CUTS)
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('case', all_but_slow('resnet50', 'resnet18', 'mobilenet_v2', 'vit'))
def test_blocks_one_after_another_are_the_whole(case, train, cut):
    """Bit for bit, in compiled programs and in one case eagerly: the same operations in the same order."""
    network, variables = small_with_inputs(case, cut), drawn(case)
    assert len(network.blocks) == NUMBER_OF_BLOCKS[case][CUTS.index(cut)]
    assert all(len(crossings) == 1 for crossings in network.crossings)  # one array at every cut

    def run_whole(variables, x):
        return network.apply(variables, x, train=train)

    def run_blocks(variables, x):
        run = network.bind(variables, train=train).run(x)
        return (compose(network, variables, x, train), run.outputs), run.state

    is_eager = (case, train, cut) == ('vgg_small', True, 'block')
    transform = (lambda function: function) if is_eager else quick_jit
    (whole, state), (outputs, own_state) = transform(run_whole)(variables, X), transform(run_blocks)(variables, X)
    for output in outputs:
        np.testing.assert_array_equal(output, whole)
    jax.tree.map(np.testing.assert_array_equal, own_state, state)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', all_but_slow('resnet50', 'mobilenet_v2', 'vit'))
def test_features_have_the_dtype_of_the_computation_and_logits_are_float32(case, dtype):
    network = small_with_inputs(case, dtype=dtype)
    *features, (logits,) = network.crossings
    assert {crossing.dtype for (crossing,) in features} == {jnp.dtype(dtype)}
    assert (logits.dtype, logits.shape, logits.axis) == (jnp.float32, (1, NUM_CLASSES), 0)


@pytest.mark.parametrize('case', SMALL)
def test_neither_the_cut_nor_the_dtype_nor_remat_changes_the_parameters(case):
    expected = jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype('float32')), drawn(case))
    network = small(case, 'block', dtype='bfloat16', remat=True)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGE_SHAPE))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == expected


@pytest.mark.parametrize('case', all_but_slow('resnet50', 'mobilenet_v2', 'vit'))
def test_bfloat16_is_near_float32(case):
    near, exact = (np.asarray(logits(case, dtype)) for dtype in ('bfloat16', 'float32'))
    assert not np.array_equal(near, exact)
    np.testing.assert_allclose(near, exact, atol=0.2 * np.abs(exact).max())


@pytest.mark.parametrize('case', all_but_slow('resnet50', 'resnet18', 'mobilenet_v2', 'vit'))
def test_gradients_are_finite_and_reach_every_parameter(case):
    loss, gradients = loss_and_gradients(case, remat=False)
    assert np.isfinite(loss)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.all(np.isfinite(gradient)), path
        assert np.any(np.asarray(gradient) != 0), path


@pytest.mark.parametrize('case', all_but_slow('resnet50', 'mobilenet_v2', 'resnet18', 'vit'))
def test_remat_changes_no_gradient(case):
    assert_remat_changes_nothing(case, train=True)


def test_remat_changes_no_gradient_in_inference():
    assert_remat_changes_nothing('vgg_small', train=False)


def assert_remat_changes_nothing(case, train):
    (loss, gradients), (expected_loss, expected) = (loss_and_gradients(case, remat, train) for remat in (True, False))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-3, atol=1e-5 * largest), gradients, expected)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('remat', [False, True])
def test_each_block_is_recomputed_where_that_is_asked_for(remat, train):
    network, variables = small('cifar_resnet', remat=remat), drawn('cifar_resnet')

    def loss(params):
        return jnp.sum(network.apply({**variables, 'params': params}, X, train=train)[0])

    traced = jax.make_jaxpr(jax.grad(loss))(variables['params'])
    recomputed = [equation for equation in traced.jaxpr.eqns if 'prevent_cse' in equation.params]
    assert len(recomputed) == (len(network.module.parts) - 2 if remat else 0)


# Parameters in millions: ResNet, torchvision's model list (arXiv 1512.03385); MobileNetV2, arXiv 1801.04381, table 4;
# DeiT, arXiv 2012.12877, table 1 (there rounded to 5, 22 and 86); CIFAR ResNet, arXiv 1512.03385, table 6.
@pytest.mark.parametrize(
    ('name', 'options', 'num_classes', 'size', 'millions'),
    [
        ('resnet', {'depth': 18}, 1000, 224, 11.69),
        ('resnet', {'depth': 34}, 1000, 224, 21.80),
        ('resnet', {'depth': 50}, 1000, 224, 25.56),
        ('resnet', {'depth': 101}, 1000, 224, 44.55),
        ('mobilenet_v2', {}, 1000, 224, 3.50),
        ('mobilenet_v2', {'width_multiplier': 1.4}, 1000, 224, 6.11),
        ('vit', {'size': 'tiny'}, 1000, 224, 5.72),
        ('vit', {'size': 'small'}, 1000, 224, 22.05),
        ('vit', {'size': 'base'}, 1000, 224, 86.57),
        ('cifar_resnet', {'depth': 20}, 10, 32, 0.27),
        ('vgg_small', {}, 10, 32, 4.66),
    ],
)
def test_parameter_counts(name, options, num_classes, size, millions):
    network = make_network(name, num_classes, 'stage', options)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), (size, size, 3)))['params']
    assert round(count(params) / 1e6, 2) == millions


# In millions, as public tables have them; some tools count norms, pools and sums too, which makes up to 0.6 %.
@pytest.mark.parametrize(
    ('name', 'options', 'num_classes', 'size', 'millions'),
    [
        ('resnet', {'depth': 18}, 1000, 224, 1820),
        ('resnet', {'depth': 50}, 1000, 224, 4100),
        ('mobilenet_v2', {}, 1000, 224, 300),
        ('vit', {'size': 'tiny'}, 1000, 224, 1260),
        ('cifar_resnet', {'depth': 20}, 10, 32, 40.6),
    ],
)
def test_counts_of_multiply_accumulates(name, options, num_classes, size, millions):
    network = make_network(name, num_classes, 'stage', options)
    variables: Any = jax.eval_shape(lambda: network.init(jax.random.key(0), (size, size, 3)))

    image = jax.ShapeDtypeStruct((1, size, size, 3), 'float32')
    macs = count_macs(lambda variables, x: network.apply(variables, x, train=False)[0], variables, image)
    np.testing.assert_allclose(sum(macs.values()) / 1e6, millions, rtol=0.006)


def test_channels_are_rounded_to_eights_and_lose_no_tenth():
    assert [make_divisible(channels) for channels in (1, 8, 11.9, 12, 33.6, 16.8)] == [8, 8, 16, 16, 32, 16]
    assert make_divisible(11) == 16  # 8 would be less than nine tenths


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('resnet', {'depth': 20}, '18, 34, 50, 101'),
        ('resnet', {'depth': 18, 'dtype': 'float16'}, 'float32, bfloat16'),
        ('mobilenet_v2', {'padding': 'same'}, 'torch, tf'),
        ('mobilenet_v2', {'width_multiplier': 0}, 'positive'),
        ('vit', {'size': 'huge'}, 'tiny, small, base'),
        ('vgg_small', {'widht': 8}, "Did you mean 'width'"),
    ],
)
def test_refuses_values_that_do_not_exist(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_network(name, 10, 'stage', options)


def test_vit_refuses_images_that_do_not_divide_into_patches():
    with pytest.raises(ValueError, match='patches of 16'):
        small('vit').init(jax.random.key(0), (40, 32, 3))


def test_max_pool_of_resnet_pads_with_what_is_never_the_maximum():
    network, variables = small('resnet18'), drawn('resnet18')
    stem = variables['params']['stem']
    negative = {**stem, 'norm': {**stem['norm'], 'bias': -100 * jnp.ones_like(stem['norm']['bias'])}}
    variables = {**variables, 'params': {**variables['params'], 'stem': negative}}

    @quick_jit
    def run(variables):
        seen = {}

        def look(call, args, kwargs, context):
            seen['/'.join(context.module.path)] = output = call(*args, **kwargs)
            return output

        with nn.intercept_methods(look):
            network.apply(variables, X, train=False)
        return seen['stem']

    np.testing.assert_array_equal(run(variables), jnp.zeros((len(X), 8, 8, 4)))
