import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.blocks.chain import CUTS
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.networks.cifar_resnet import ResidualBlock, cifar_resnet
from tests.foreign.cases import draw_variables

KEY = jax.random.key(0)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(('depth', 'millions'), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_counts_are_those_of_the_paper(depth, millions):
    """He et al., arXiv 1512.03385, table 6."""
    network = cifar_resnet(10, depth=depth)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), (32, 32, 3)))['params']
    digits = 1 if millions == 1.7 else 2
    assert round(count(params) / 1e6, digits) == millions


@pytest.mark.parametrize('shortcut', ['A', 'B'])
@pytest.mark.parametrize('granularity', CUTS)
def test_the_network_is_its_module(shortcut, granularity):
    network = cifar_resnet(10, depth=14, width=4, shortcut=shortcut, cut=granularity)
    variables = draw_variables(with_inputs(network, (8, 8, 3)))
    x = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    own = jax.jit(lambda variables: network.apply(variables, x, train=False)[0])(variables)
    np.testing.assert_array_equal(own, jax.jit(lambda variables: network.module.apply(variables, x))(variables))
    ends = ('stage1_block2', 'stage2_block2', 'stage3_block2')
    assert network.blocks == (ends if granularity == 'stage' else tuple(n for n, _ in network.module.parts[1:-1]))


def test_the_cut_does_not_change_the_parameters():
    networks = [cifar_resnet(10, depth=8, width=4, cut=cut) for cut in CUTS]
    trees = [jax.jit(lambda key, network=network: network.init(key, (8, 8, 3)))(KEY) for network in networks]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_training_updates_all_statistics_and_evaluation_none():
    network = cifar_resnet(10, depth=8, width=4)
    variables = draw_variables(with_inputs(network, (8, 8, 3)))
    x = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    state, unchanged = jax.jit(lambda v: [network.apply(v, x, train=train)[1] for train in (True, False)])(variables)
    pairs = zip(*map(jax.tree.leaves, (state['batch_stats'], variables['batch_stats'])), strict=True)
    assert not any(np.array_equal(*pair) for pair in pairs)
    jax.tree.map(np.testing.assert_array_equal, unchanged['batch_stats'], variables['batch_stats'])


def test_shortcut_a_subsamples_and_pads_channels_on_both_sides():
    block = ResidualBlock(features=8, stride=2, shortcut='A')
    x = jax.random.uniform(jax.random.key(0), (1, 4, 4, 4))
    variables = block.init(jax.random.key(1), x, False)
    variables['params']['norm2']['scale'] = jnp.zeros(8)  # the residual branch gives nothing
    expected = np.zeros((1, 2, 2, 8), np.float32)
    expected[..., 2:6] = np.asarray(x)[:, ::2, ::2]
    np.testing.assert_array_equal(block.apply(variables, x, False), expected)


@pytest.mark.parametrize('depth', [2, 18, 19, 21])
def test_refuses_depths_that_are_not_6n_plus_2(depth):
    with pytest.raises(ValueError, match='6n'):
        cifar_resnet(10, depth=depth)


def test_refuses_shortcuts_and_cuts_that_do_not_exist():
    with pytest.raises(ValueError, match='A, B'):
        cifar_resnet(10, depth=8, shortcut='C')
    with pytest.raises(ValueError, match='stage, block'):
        cifar_resnet(10, depth=8, cut='layer')
