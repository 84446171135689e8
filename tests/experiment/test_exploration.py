"""What tracing a network shows is remembered by everything that it depends on."""

import jax
import numpy as np
import pytest

from bqat_jax.blocks.splitting import split_after
from bqat_jax.experiment.exploration import explore_network
from bqat_jax.networks.registry import NETWORKS, register_network
from tests.blocks.outside import Network

IMAGE = jax.ShapeDtypeStruct((8, 8, 1), np.float32)
ENDS = ['layer0', 'layer1', 'layer2']


def explore(name='mine', classes=10, inputs=IMAGE, **options):
    return explore_network(name, classes, 'block', options, None, inputs)


def register(made):
    """Makes 'mine' a network that notes in `made` how often it is built."""

    @register_network('mine')
    def mine(num_classes, *, size=8, sides=(8, 8), cut='block'):
        del cut, sides
        made.append(size)
        return split_after(Network(num_classes), ENDS, (size, size, 1))


def test_a_network_is_traced_once(registries):
    made = []
    register(made)
    first = explore(size=8)
    assert explore(size=8) is first and made == [8]
    assert next(iter(first.layers.quantizable)) == 'Conv_0' and first.unquantized_share == 0
    assert first.outputs.shape == (1, 10) and first.network.crossings
    others = [explore(), explore(classes=5)]
    assert all(other is not first for other in others) and len(made) == 3
    assert others[1].outputs.shape == (1, 5)


def test_options_of_another_type_are_refused_though_they_are_equal(registries):
    register([])
    explore(size=8)
    with pytest.raises(ValueError, match=r'network\.size=8\.0'):
        explore(size=8.0)


def test_options_that_cannot_be_remembered_are_traced_each_time(registries):
    made = []
    register(made)
    assert explore(sides=[8, 8]) is not explore(sides=[8, 8]) and len(made) == 2


def test_another_network_of_the_same_name_is_another(registries, monkeypatch):
    register(first := [])
    before = explore()
    monkeypatch.setattr(NETWORKS, 'entries', {name: x for name, x in NETWORKS.entries.items() if name != 'mine'})
    register(second := [])
    assert explore() is not before and first == second == [8]
