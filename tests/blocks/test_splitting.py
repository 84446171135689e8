"""A network from outside is cut behind its submodules, or into functions, without a change to it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.blocks.splitting import split_after, split_into
from tests.blocks import outside

SHAPE = (8, 8, 3)
X = jax.random.normal(jax.random.key(1), (4, *SHAPE))


class SetUp(nn.Module):
    """Submodules from `setup`, one list of them, dropout, and `deterministic` for evaluation."""

    def setup(self):
        self.embed = nn.Conv(6, (2, 2), (2, 2))
        self.layers = [nn.Dense(6) for _ in range(3)]
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Dense(3)

    def __call__(self, x, deterministic):
        x = self.embed(x).reshape(x.shape[0], -1, 6)
        for layer in self.layers:
            x = self.dropout(x + nn.gelu(layer(x)), deterministic=deterministic)
        return self.out(x.mean(1))


class Nested(nn.Module):
    """The blocks lie in a submodule, one of them is called twice, and one is rematerialised."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(Encoder(name='encoder')(x.reshape(x.shape[0], -1)))


class Encoder(nn.Module):
    """See `Nested`."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, name='first')(x))
        shared = nn.Dense(5, name='shared')
        x = nn.relu(shared(x))
        x = nn.remat(nn.Dense)(5, name='middle')(x)
        return nn.LayerNorm()(shared(x))


CUTS = {
    'compact': (outside.Network(), ('layer0', 'layer1', 'layer2')),
    'setup': (SetUp(), ('dropout', 'dropout', 'dropout')),
    'nested': (Nested(), ('encoder/first', 'encoder/shared', 'encoder/middle', 'encoder/shared')),
}


@pytest.mark.parametrize('name', list(CUTS))
@pytest.mark.parametrize('train', [False, True])
def test_the_pieces_compose_to_the_whole(name, train):
    module, ends = CUTS[name]
    network = split_after(module, ends, SHAPE)
    variables = network.init(jax.random.key(0), SHAPE)
    h, now = X, dict(variables)
    for names in (*network.segments, network.head):
        h, now['batch_stats'] = network.apply(now, h, names, train=train, key=jax.random.key(2))
    if name == 'setup' and train:  # pieces draw for themselves
        assert jnp.isfinite(h).all()
        return
    whole, stats = network.apply(variables, X, network.names, train=train)
    np.testing.assert_array_equal(h, whole)
    jax.tree.map(np.testing.assert_array_equal, now['batch_stats'], stats)
    switch = {'compact': {'train': train}, 'setup': {'deterministic': not train}, 'nested': {}}[name]
    expected, updated = module.apply(variables, X, **switch, mutable=['batch_stats'])
    np.testing.assert_array_equal(whole, expected)
    if train and stats:
        jax.tree.map(np.testing.assert_array_equal, stats, updated['batch_stats'])


def test_a_piece_computes_nothing_of_the_others():
    network = split_after(*CUTS['compact'], SHAPE)
    variables = network.init(jax.random.key(0), SHAPE)
    h, _ = network.apply(variables, X, network.segments[0], train=False)

    def count(x, names):
        run = jax.jit(lambda x: network.apply(variables, x, names, train=False)[0])
        text = run.lower(x).compile().as_text()
        return text.count(' convolution(') + text.count(' dot(')  # of a 1×1 convolution XLA makes a product

    assert [count(X, network.segments[0]), count(h, network.segments[1]), count(X, network.names)] == [4, 3, 11]


def test_a_cut_into_functions():
    network = split_into(
        SetUp(),
        lambda module, x, train: module.embed(x).reshape(x.shape[0], -1, 6),
        [
            lambda module, x, train, i=i: module.dropout(x + nn.gelu(module.layers[i](x)), deterministic=not train)
            for i in range(3)
        ],
        lambda module, x, train: module.out(x.mean(1)),
    )
    variables = network.init(jax.random.key(0), SHAPE)
    got, _ = network.apply(variables, X, network.names, train=False)
    np.testing.assert_array_equal(got, SetUp().apply(variables, X, deterministic=True))
    assert network.segments[0] == ('stem', 'block1')


class Bypassed(nn.Module):
    """What `a` gives is used behind the end of `b`."""

    @nn.compact
    def __call__(self, x):
        a = nn.Conv(4, (3, 3), name='a')(x)
        b = nn.Conv(4, (3, 3), name='b')(a)
        return nn.Dense(3)((a + b).mean((1, 2)))


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match='passes by the cut'):
        split_after(Bypassed(), ['a', 'b'], SHAPE)
    with pytest.raises(ValueError, match='passes by the cut'):
        split_after(SetUp(), ['layers_0', 'layers_1'], SHAPE)  # the shortcut around a layer is added behind it
    with pytest.raises(ValueError, match=r"'layer1' is never reached: .* after 'layer2'"):
        split_after(outside.Network(), ['layer0', 'layer2', 'layer1'], SHAPE)
    with pytest.raises(ValueError, match=r"'layer' is never reached: .* after the input"):
        split_after(outside.Network(), ['layer', 'layer2'], SHAPE)
    with pytest.raises(ValueError, match='at least two'):
        split_after(outside.Network(), ['layer0'], SHAPE)
    with pytest.raises(ValueError, match='at least two'):
        split_into(SetUp(), lambda m, x, t: x, [lambda m, x, t: x], lambda m, x, t: x)


def test_the_argument_for_training_may_be_anything():
    class Modal(nn.Module):
        @nn.compact
        def __call__(self, x, mode):
            for number in range(2):
                x = nn.Dense(4, name=f'layer{number}')(x)
                x = nn.BatchNorm(use_running_average=mode != 'fit')(x)
            return x.mean((1, 2))

    network = split_after(
        Modal(), ['layer0', 'layer1'], SHAPE, lambda module, x, train: module(x, 'fit' if train else 'use')
    )
    variables = network.init(jax.random.key(0), SHAPE)
    for train, mode in ((True, 'fit'), (False, 'use')):
        got, _ = network.apply(variables, X, network.names, train=train)
        expected, _ = Modal().apply(variables, X, mode, mutable=['batch_stats'])
        np.testing.assert_array_equal(got, expected)
    assert jnp.isfinite(got).all()
