"""What a network does with its layers' parameters and calls is not known before it is tried; answers stay the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bqat_jax as bq
from bqat_jax.export import logits_function
from bqat_jax.export.frozen import INTEGER, LOOKUP
from bqat_jax.export.verification import fake_quantized
from tests.export.networks import images, lsq, quantize


def named(name):
    def decorator(function):
        CASES[name] = function
        return function

    return decorator


CASES: dict = {}


@named('tied weights')
class Tied(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        first = nn.Dense(4, name='a')
        y = nn.Dense(4, name='b')(nn.relu(first(x)))
        return y @ first.variables['params']['kernel'].T


class ReadsItself(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) - x @ self.get_variable('params', 'kernel').mean(1, keepdims=True)


@named('a subclass that reads its kernel')
class Own(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4, name='b')(nn.relu(ReadsItself(5, name='a')(x)))


@named('a batch norm with more around it')
class MoreNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = NormAndMore(use_running_average=not train, name='norm')(nn.Dense(5, name='a')(x))
        return nn.Dense(4, name='b')(x)


class NormAndMore(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return nn.relu(super().__call__(x, use_running_average)) * 2 - 1


@named('a kernel that is transposed on its way')
class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        def turn(variables):
            return jax.tree.map(lambda v: v.T if v.ndim == 2 else v, variables)

        mapped = nn.map_variables(Holder, 'params', turn, mutable=False, init=self.is_initializing())
        return nn.Dense(4, name='b')(nn.relu(mapped(name='h')(x)))


class Holder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name='a')(x)


@named('one Einsum with two equations')
class TwoEquations(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        layer = nn.Einsum((4, 4), None, name='a', use_bias=False)
        y = nn.Dense(4, name='b')(nn.relu(layer(x, 'bd,de->be')))
        return layer(nn.relu(y), 'be,de->bd')


@named('a product that is not linear')
class Cosine(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        def product(a, b, dimensions, **options):
            return jax.lax.dot_general(a, b / jnp.linalg.norm(b), dimensions, **options)

        return nn.Dense(4, name='b')(nn.relu(nn.Dense(5, dot_general=product, name='a')(x)))


@named('layers under vmap whose examples have no axis')
class Mapped1(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        over = {'variable_axes': {'params': None}, 'split_rngs': {'params': False}}
        y = nn.relu(nn.vmap(nn.Dense, **over)(6, name='a')(x))
        y = nn.vmap(nn.DenseGeneral, **over)(4, axis=-1, batch_dims=(0,), name='g')(y.reshape(-1, 3, 2))
        return nn.Dense(4, name='b')(y.reshape(-1, 12))


@named('batch norm whose statistics are stacked otherwise')
class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(2, name='a')(x)
        norm = nn.vmap(
            nn.BatchNorm,
            variable_axes={'params': 1, 'batch_stats': 0},
            in_axes=None,
            axis_size=2,
            split_rngs={'params': True},
        )
        return nn.Dense(4, name='b')(norm(use_running_average=not train, name='norm')(y).mean(0))


@named('batch norm of whole numbers')
class OfIntegers(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.BatchNorm(use_running_average=not train, name='norm')(jnp.round(x * 3).astype(jnp.int32))
        return nn.Dense(4, name='b')(nn.relu(nn.Dense(5, name='a')(y)))


@named('statistics that are read elsewhere')
class Reads(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4, name='b')(nn.relu(NormPlusMean(name='h')(nn.Dense(5, name='a')(x), train)))


class NormPlusMean(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, name='norm')
        return norm(x=x) + norm.variables['batch_stats']['mean'].mean()


@named('a spectral norm')
class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.SpectralNorm(nn.Dense(5, name='a'), name='sn')(x, update_stats=train)
        return nn.Dense(4, name='b')(nn.relu(y))


@pytest.mark.parametrize('activations', [pytest.param('lsq', marks=pytest.mark.slow), 'lsq_plus'])
@pytest.mark.parametrize('name', CASES)
def test_answers_are_those_of_the_fake_quantized_network(name, activations):
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        network = bq.split_after(CASES[name](), ends(name), jax.ShapeDtypeStruct((4,), jnp.float32))
        settings = {'name': activations, 'bits': 4}
        quantized = quantize(network, images((4,)), lsq(3, granularity='channel'), settings)
        expected, _ = fake_quantized(quantized.network, quantized.quantization, quantized.variables)
        for arithmetic in ('float32', 'int8'):
            got = logits_function(quantized.frozen, quantized.network, arithmetic)(quantized.inputs)
            np.testing.assert_allclose(got, expected(quantized.inputs), rtol=1e-5, atol=1e-5)
    modes = {path.rpartition('/')[2]: layer.mode for path, layer in quantized.frozen.layers.items()}
    assert modes['b'] == (LOOKUP if name == 'a spectral norm' else INTEGER)
    if name in (
        'a kernel that is transposed on its way',
        'one Einsum with two equations',
        'a product that is not linear',
    ):
        assert modes['a'] == LOOKUP


def ends(name):
    first = {'a kernel that is transposed on its way': 'h', 'a spectral norm': 'sn'}.get(name, 'a')
    return (first, 'b')
