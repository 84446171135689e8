"""Vision transformers: ViT and DeiT, tiny, small and base."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.chain import split_chain
from bqat_jax.networks.layers import block_class, computation, traced_once
from bqat_jax.networks.registry import register_network

# Width and heads (Touvron et al., arXiv 2012.12877, table 1).
SIZES = {'tiny': (192, 3), 'small': (384, 6), 'base': (768, 12)}
NUM_BLOCKS, BLOCKS_PER_STAGE = 12, 3
MLP_RATIO = 4
WEIGHT_INIT = traced_once(nn.initializers.truncated_normal(0.02))


@register_network('vit')
def vit(
    num_classes: int,
    *,
    size: str = 'tiny',
    patch_size: int = 16,
    norm_epsilon: float = 1e-6,
    dtype: str = 'float32',
    remat: bool = False,
    cut: str = 'stage',
) -> BlockNetwork:
    """Returns a vision transformer (Dosovitskiy et al., arXiv 2010.11929; sizes of DeiT, arXiv 2012.12877, table 1).

    Twelve blocks with the norm before attention and MLP; the logits are computed from a class token. The number of
    learned positions depends on the size of the images. Parts: stem, block1, ..., block12, head. Hugging Face's weights
    need norm_epsilon=1e-12.

    Args:
        num_classes: number of logits.
        size: 'tiny', 'small' or 'base'.
        patch_size: side of a patch; it must divide the sides of the images.
        norm_epsilon: epsilon of layer norm.
        dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters, layer norm and softmax are float32.
        remat: whether blocks recompute their activations in the backward pass.
        cut: 'stage' (four stages of three blocks), 'block' or names of blocks, see `blocks.chain.split_chain`.

    Raises:
        ValueError: for an invalid value.
    """
    if size not in SIZES:
        raise ValueError(f'size={size!r}: must be one of {", ".join(SIZES)}.')
    features, heads = SIZES[size]
    compute_dtype = computation(dtype, None).dtype
    block = partial(block_class(Block, remat), heads, norm_epsilon, compute_dtype)
    stages = [
        {f'block{number}': block for number in range(first, first + BLOCKS_PER_STAGE)}
        for first in range(1, NUM_BLOCKS, BLOCKS_PER_STAGE)
    ]
    return split_chain(
        partial(Stem, features, patch_size, compute_dtype),
        stages,
        partial(Head, num_classes, norm_epsilon, compute_dtype),
        cut,
    )


def _dense(features: int, name: str, dtype: Any) -> nn.Dense:
    return nn.Dense(features, kernel_init=WEIGHT_INIT, dtype=dtype, name=name)


def _layer_norm(x: jax.Array, epsilon: float, name: str) -> jax.Array:
    """Returns the layer norm, computed in float32, in the dtype of x."""
    return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, name=name)(x.astype(jnp.float32)).astype(x.dtype)


class Stem(nn.Module):
    """Embeds patches, prepends a class token, and adds learned positions.

    Attributes:
        features: width of a token.
        patch_size: side of a patch.
        dtype: dtype of the computation.
    """

    features: int
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to tokens (batch, 1 + patches, features)."""
        del train
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(f'Images of {x.shape[1]} by {x.shape[2]} do not divide into patches of {self.patch_size}.')
        sides = (self.patch_size, self.patch_size)
        patches = nn.Conv(self.features, sides, strides=sides, padding='VALID', dtype=self.dtype, name='patch_embed')(x)
        tokens = patches.reshape(x.shape[0], -1, self.features)
        first = self.param('class_token', WEIGHT_INIT, (1, 1, self.features))
        positions = self.param('positions', WEIGHT_INIT, (1, 1 + tokens.shape[1], self.features))
        first = jnp.broadcast_to(first.astype(self.dtype), (x.shape[0], 1, self.features))
        return jnp.concatenate([first, tokens], axis=1) + positions.astype(self.dtype)


class Block(nn.Module):
    """Self-attention and an MLP, each after a layer norm and with a shortcut.

    Attributes:
        heads: number of attention heads; it must divide the width.
        norm_epsilon: epsilon of layer norm.
        dtype: dtype of the computation.
    """

    heads: int
    norm_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps tokens (batch, tokens, features) to tokens."""
        del train
        features = x.shape[-1]
        y = _layer_norm(x, self.norm_epsilon, 'norm1')
        query, key, value = (
            _dense(features, name, self.dtype)(y).reshape(*y.shape[:-1], self.heads, -1)
            for name in ('query', 'key', 'value')
        )
        y = attend(query, key, value).reshape(x.shape)
        x = x + _dense(features, 'out', self.dtype)(y)
        y = _layer_norm(x, self.norm_epsilon, 'norm2')
        y = nn.gelu(_dense(MLP_RATIO * features, 'fc1', self.dtype)(y), approximate=False)
        return x + _dense(features, 'fc2', self.dtype)(y)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Returns softmax(q kᵀ / √d) v of arrays (batch, tokens, heads, d); the softmax is always float32."""
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32) * scale
    weights = nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


class Head(nn.Module):
    """Layer norm and a dense layer on the class token; logits are float32."""

    num_classes: int
    norm_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps tokens (batch, tokens, features) to logits (batch, classes)."""
        del train
        x = _layer_norm(x[:, 0], self.norm_epsilon, 'norm')
        return _dense(self.num_classes, 'dense', self.dtype)(x).astype(jnp.float32)
