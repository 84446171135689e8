"""Small networks with every kind of layer, quantized without training."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bqat_jax as bq
from bqat_jax.blocks.block_network import other_collections
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.export.freezing import freeze
from bqat_jax.export.frozen import Frozen
from bqat_jax.networks import make_network
from tests.foreign.cases import CASES, cut, draw_variables

BATCH = 6


class Quantized(NamedTuple):
    """A quantized network, and what it becomes."""

    network: Any
    quantization: Any
    variables: Any
    frozen: Frozen
    inputs: Any


def images(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, *shape)), jnp.float32)


def quantize(network, inputs, weights, activations, rules=(), **options):
    """Calibrates quantizers on one batch and freezes the network."""
    return quantize_variables(network, draw_variables(network), inputs, weights, activations, rules, **options)


def quantize_variables(network, variables, inputs, weights, activations, rules=(), **options):
    """Of a network with variables."""
    run = network.as_function(variables, train=False)
    prepared = bq.prepare(
        run, variables['params'], [inputs], weights=weights, activations=activations, rules=rules, allow_unquantized=1.0
    )
    whole = bq.Variables(variables['params'], prepared.quantizers, other_collections(variables))
    frozen = freeze(network, prepared.quantization, whole, **options)
    return Quantized(network, prepared.quantization, whole, frozen, inputs)


def lsq(bits, **options):
    return {'name': 'lsq', 'bits': bits, **options}


@functools.cache
def of_family(name):
    """One of each family, with 8-bit first and last layers as recipes have them where the family has such names."""
    shape, options, rules = FAMILIES[name]
    dtype = jnp.int32 if name == 'decoder' else jnp.float32
    network = with_inputs(make_network(name, 10, 'stage', options), jax.ShapeDtypeStruct(shape, dtype))
    inputs = images(shape)
    if name == 'decoder':
        inputs = jnp.asarray(np.random.default_rng(0).integers(0, 10, (BATCH, *shape)), jnp.int32)
    eight = [{'layers': rule, 'weights': lsq(8), 'activations': lsq(8)} for rule in rules]
    return quantize(network, inputs, lsq(2, granularity='channel'), lsq(4), eight)


@functools.cache
def of_stranger(name):
    """A network that strangers wrote, under the settings that JAX has by itself."""
    with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
        return quantize_variables(*cut(name), CASES[name].batch(), lsq(4), lsq(4))


class Two(nn.Module):
    """Two dense layers."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name='last')(nn.relu(nn.Dense(self.width, name='first')(x)))


def of_two(width, weights, activations, is_signed=False):
    """`Two` on four numbers, positive ones if not told otherwise; settings are names and bits."""
    network = bq.split_after(Two(width), ('first', 'last'), jax.ShapeDtypeStruct((4,), jnp.float32))
    own, of_inputs = ({'name': name, 'bits': bits} for name, bits in (weights, activations))
    return quantize(network, images((4,)) if is_signed else jnp.abs(images((4,))), own, of_inputs)


FAMILIES: dict[str, Any] = {
    'cifar_resnet': ((8, 8, 3), {'depth': 8, 'width': 4}, ('stem/conv', 'head/dense')),
    'unet': ((8, 8, 1), {'width': 4}, ('down1/conv1', 'head')),
    'decoder': ((6,), {'width': 8, 'heads': 2, 'depth': 2}, ()),
    'vgg_small': ((32, 32, 3), {'width': 4}, ()),
    'mobilenet_v2': ((32, 32, 3), {}, ()),
    'resnet18': ((32, 32, 3), {}, ()),
    'vit': ((32, 32, 3), {'patch_size': 16}, ()),
}


class Ours(nn.Module):
    """A layer of a user's own, with a bias of its own kind."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param('matrix', nn.initializers.lecun_normal(), (x.shape[-1], 4))
        return jnp.tanh(x @ kernel) + 1


bq.register_layer(Ours, kernel='matrix')


class Everything(nn.Module):
    """One of each kind of layer; images of 8 by 8."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(4, (3, 3), name='conv')(x))
        x = nn.relu(nn.Conv(8, (3, 3), 2, feature_group_count=4, name='grouped')(x)) - 0.2
        x = nn.Conv(4, (3, 2), kernel_dilation=(2, 1), name='dilated')(x)
        x = nn.BatchNorm(use_running_average=not train, name='norm')(
            nn.ConvTranspose(6, (3, 3), (2, 2), name='grow')(x)
        )
        x = nn.relu(nn.ConvLocal(3, (2, 2), (2, 2), name='local')(x))
        x = nn.ConvTranspose(4, (3, 3), transpose_kernel=True, name='turned')(x)
        x = nn.DenseGeneral((2, 3), axis=(1, -1), name='general')(x)
        x = nn.Einsum((2, 3, 5), 'bwhd,hde->behw', name='einsum')(x)
        x = nn.Einsum((5, 4), '...hw,hd->...wd', name='ellipsis', use_bias=False)(jnp.moveaxis(x, 1, 2))
        x = Ours(name='ours')(x)
        dense = nn.Dense(4, name='twice')
        x = dense(nn.relu(dense(x)))
        x = nn.scan(Step, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)(name='steps')(x, None)[0]
        return nn.Dense(3, name='head')(x.reshape(x.shape[0], -1))


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(4, name='dense')(x)), None


@functools.cache
def everything(weights='lsq', activations='lsq', bits=4, weight_bits=3):
    network = bq.split_after(Everything(), ('grouped', 'general'), jax.ShapeDtypeStruct((8, 8, 2), jnp.float32))
    own = {'name': weights, 'bits': weight_bits, 'granularity': 'auto'}
    return quantize(network, images((8, 8, 2)), own, {'name': activations, 'bits': bits})
