"""A small decoder-only transformer whose layers are one `nn.scan`."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.chain import CUTS
from bqat_jax.blocks.switch import make_call
from bqat_jax.networks.layers import computation, traced_once
from bqat_jax.networks.registry import register_network

MLP_RATIO = 4
STAGES = 2
WEIGHT_INIT = traced_once(nn.initializers.normal(0.02))
_CUT = re.compile(r'layers\[\d+\](,layers\[\d+\])*')


@register_network('decoder')
def decoder(
    num_classes: int,
    *,
    depth: int = 4,
    width: int = 96,
    heads: int = 4,
    dtype: str = 'float32',
    unroll: bool = False,
    cut: str = 'stage',
) -> BlockNetwork:
    """Returns a decoder-only transformer for sequences of tokens (Radford et al., GPT-2, 2019).

    Layers have the norm before attention and MLP; learned positions have the length of the inputs. Parts: embed,
    positions, layers (one `nn.scan`), norm, head.

    Args:
        num_classes: size of the vocabulary.
        depth: number of layers.
        width: width of a token.
        heads: number of attention heads; it must divide the width.
        dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters, layer norm and softmax are float32.
        unroll: whether the loop over the layers is unrolled: faster steps, slower compilation.
        cut: 'stage' (two blocks with equal numbers of layers), 'block' (one layer each) or the last layers of the
            blocks, such as 'layers[0],layers[3]'.

    Raises:
        ValueError: for a value that does not fit.
    """
    if width % heads:
        raise ValueError(f'heads={heads}, width={width}: heads must divide width.')
    if depth < 2:
        raise ValueError(f'depth={depth}: block replacement needs at least two layers.')
    if cut in CUTS:
        step = depth // STAGES if cut == 'stage' else 1
        numbers = [depth - 1 - step * number for number in range(STAGES if cut == 'stage' else depth)][::-1]
        ends = tuple(f'layers[{number}]' for number in numbers)
    elif _CUT.fullmatch(cut.replace(' ', '')):
        ends = tuple(cut.replace(' ', '').split(','))
    else:
        raise ValueError(f"cut={cut!r}: must be one of {', '.join(CUTS)}, or layers such as 'layers[0],layers[3]'.")
    module = Decoder(num_classes, depth, width, heads, unroll, computation(dtype, None).dtype)
    return BlockNetwork(module, ends, make_call(module))


class Decoder(nn.Module):
    """See `decoder`."""

    num_classes: int
    depth: int
    width: int
    heads: int
    unroll: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens, int32 (batch, length), to logits of the next tokens, float32 (batch, length, classes)."""
        embed = nn.Embed(self.num_classes, self.width, embedding_init=WEIGHT_INIT, dtype=self.dtype, name='embed')
        positions = self.param('positions', WEIGHT_INIT, (tokens.shape[1], self.width))
        x = embed(tokens) + positions.astype(self.dtype)[None]
        layers = nn.scan(
            Layer,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=self.depth,
            unroll=self.depth if self.unroll else 1,
        )(self.heads, self.depth, self.dtype, name='layers')
        x, _ = layers(x, None)
        x = layer_norm(x, 'norm')
        return nn.Dense(self.num_classes, kernel_init=WEIGHT_INIT, dtype=self.dtype, name='head')(x).astype(jnp.float32)


class Layer(nn.Module):
    """Causal self-attention and an MLP, each after a layer norm and with a shortcut."""

    heads: int
    depth: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps features (batch, length, width) to features."""
        width = x.shape[-1]
        # Layers that add to the shortcut start small, so that the sum does not grow with the depth.
        small = nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5)
        y = layer_norm(x, 'norm1')
        query, key, value = (
            nn.Dense(width, kernel_init=WEIGHT_INIT, dtype=self.dtype, name=name)(y).reshape(
                *y.shape[:-1], self.heads, -1
            )
            for name in ('query', 'key', 'value')
        )
        y = attend_backwards(query, key, value).reshape(x.shape)
        x = x + nn.Dense(width, kernel_init=small, dtype=self.dtype, name='out')(y)
        y = layer_norm(x, 'norm2')
        y = nn.gelu(nn.Dense(MLP_RATIO * width, kernel_init=WEIGHT_INIT, dtype=self.dtype, name='fc1')(y))
        return x + nn.Dense(width, kernel_init=small, dtype=self.dtype, name='fc2')(y), None


def layer_norm(x: jax.Array, name: str) -> jax.Array:
    """Returns the layer norm, computed in float32, in the dtype of x."""
    return nn.LayerNorm(dtype=jnp.float32, name=name)(x.astype(jnp.float32)).astype(x.dtype)


def attend_backwards(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns causal attention, softmax(q kᵀ / √d) v, of arrays (batch, length, heads, d); the softmax is float32."""
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    weights = nn.softmax(jnp.where(causal, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(value.dtype)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value)
