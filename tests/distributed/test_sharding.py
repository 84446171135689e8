import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from bqat_jax.distributed.sharding import Placement, Rule, make_mesh, parse_rules
from bqat_jax.errors import UserError
from bqat_jax.networks.resnet import resnet

EIGHT = make_mesh(1, 8)


@pytest.mark.parametrize(('data', 'fsdp', 'shape'), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (1, 8, (1, 8)), (3, 2, (3, 2))])
def test_a_mesh_has_the_axes_that_were_asked_for(data, fsdp, shape):
    mesh = make_mesh(data, fsdp)
    assert mesh.devices.shape == shape and mesh.axis_names == ('data', 'fsdp')


@pytest.mark.parametrize(
    ('data', 'fsdp', 'key'),
    [
        (9, 1, 'mesh.data=9'),
        (0, 1, 'mesh.data=0'),
        (3, 4, 'mesh.data=3'),
        (-1, 9, 'mesh.fsdp=9'),
        (-1, 0, 'mesh.fsdp=0'),
    ],
)
def test_a_mesh_that_there_are_no_devices_for_is_refused(data, fsdp, key):
    with pytest.raises(UserError, match=key):
        make_mesh(data, fsdp)


@pytest.mark.parametrize(
    ('shape', 'axis'),
    [((3, 3, 16, 32), 3), ((3, 3, 32, 16), 2), ((16, 16), 1), ((8, 5), 0), ((5, 7), None), ((8,), 0), ((), None)],
)
def test_the_largest_axis_that_divides_is_split_the_last_of_several(shape, axis):
    assert Placement(EIGHT).axis('conv/kernel', shape) == axis


def test_the_first_rule_that_matches_the_end_of_a_path_wins():
    rules = parse_rules(
        [{'path': 'stem/.*', 'axis': 'none'}, {'path': 'conv/kernel', 'axis': 2}, {'path': '.*/conv/kernel', 'axis': 3}]
    )
    placement = Placement(EIGHT, rules)
    assert placement.axis('params/network/stem/conv/kernel', (3, 3, 8, 64)) is None
    assert placement.axis('opt_state/0/trace/network/block/conv/kernel', (3, 3, 8, 64)) == 2
    assert placement.axis('params/network/block/my_conv/kernel', (3, 3, 8, 64)) == 3  # no whole name at its end
    assert placement.axis('params/network/head/kernel', (8, 64)) == 1
    tree = {'block': {'conv': {'kernel': jnp.zeros((3, 3, 8, 64))}}, 'norm': {'scale': jnp.zeros(5)}}
    assert placement.describe(tree) == {'block/conv/kernel': {'shape': [3, 3, 8, 64], 'axis': 2, 'rule': 'conv/kernel'}}


def test_small_arrays_stay_whole():
    placement = Placement(EIGHT, min_shard_elements=65)
    assert placement.axis('kernel', (8, 8)) is None and placement.axis('kernel', (8, 16)) == 1


def test_a_rule_that_cannot_be_followed_is_refused():
    with pytest.raises(UserError, match=r'conv/kernel has shape \(3, 3\), whose axis 0 cannot be split into 8'):
        Placement(EIGHT, (Rule('.*', 0),)).axis('conv/kernel', (3, 3))
    with pytest.raises(UserError, match='whose axis 2 cannot be split'):
        Placement(EIGHT, (Rule('.*', 2),)).axis('conv/kernel', (8, 8))


@pytest.mark.parametrize(
    ('rule', 'said'),
    [
        ({'path': 'a'}, 'keys'),
        ({'path': '(', 'axis': 1}, 'regular expression'),
        ({'path': 'a', 'axis': 'widest'}, "'widest'"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(rule, said):
    with pytest.raises(ValueError, match=said):
        parse_rules([rule])


def test_what_is_gathered_is_whole_and_its_gradient_is_split():
    placement = Placement(EIGHT)
    weights = placement.put({'kernel': jnp.arange(64.0).reshape(8, 8)})
    x = jax.device_put(jnp.arange(128.0).reshape(16, 8), placement.sharding('x', (8, 16)))

    def loss(weights, x):
        return jnp.sum(jnp.sin(x @ placement.gather(weights)['kernel']))

    def plain(weights, x):
        return jnp.sum(jnp.sin(x @ weights['kernel']))

    gathered, expected = (jax.jit(jax.grad(f))(weights, x)['kernel'] for f in (loss, plain))
    np.testing.assert_allclose(gathered, expected, rtol=1e-5, atol=1e-4)
    assert gathered.sharding.spec == PartitionSpec(None, 'fsdp')


def test_a_device_keeps_an_eighth_of_resnet18():
    network = resnet(1000, depth=18)
    placement = Placement(EIGHT, min_shard_elements=4096)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), (224, 224, 3)))['params']
    whole = own = 0
    for x, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(placement.shardings(params)), strict=True):
        whole += x.size
        own += np.prod(sharding.shard_shape(x.shape))
    assert whole > 11e6
    assert 1 / 8 <= own / whole < 1.1 / 8
