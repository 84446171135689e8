"""VGG-small, a plain convolutional network for small images that is common in the low-bit literature."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.chain import split_chain, stage_blocks
from bqat_jax.networks.layers import FLOAT32, Computation, batch_norm, block_class, computation, conv
from bqat_jax.networks.registry import register_network

STAGE_WIDTHS = (1, 2, 4)  # factors of the first stage's width; two convolutions each


@register_network('vgg_small')
def vgg_small(
    num_classes: int,
    *,
    width: int = 128,
    dtype: str = 'float32',
    remat: bool = False,
    cut: str = 'stage',
    conv_general_dilated: Callable[..., jax.Array] | None = None,
) -> BlockNetwork:
    """Returns VGG-small: six 3×3 convolutions and a dense layer (Zhang et al., arXiv 1807.10029, section 5.2).

    Three stages of two convolutions with 1, 2 and 4 times `width` channels. Batch norm and ReLU follow each
    convolution; a 2×2 max pool ends each stage, after the ReLU as in VGG networks with batch norm. The dense layer
    reads all pixels, so its weights depend on the size of the images.

    Parts: stem (the first convolution), stage1_block2, stage2_block1, ..., head.

    Args:
        num_classes: number of logits.
        width: channels of the first stage.
        dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters are float32.
        remat: whether blocks recompute their activations in the backward pass.
        cut: 'stage', 'block' (one convolution each) or names of blocks, see `blocks.chain.split_chain`.
        conv_general_dilated: computes the convolutions; None for Linen's default.

    Raises:
        ValueError: for an invalid value.
    """
    compute = computation(dtype, conv_general_dilated)
    block = block_class(ConvBlock, remat)
    stages = []
    for number, factor in enumerate(STAGE_WIDTHS, 1):
        makes = [partial(block, width * factor, pool, compute) for pool in (False, True)]
        stages.append(stage_blocks(number, makes))
    stem = stages[0].pop('stage1_block1')
    return split_chain(stem, stages, partial(Head, num_classes, compute), cut)


class ConvBlock(nn.Module):
    """3×3 convolution, batch norm, ReLU, and a 2×2 max pool if `pool`.

    Attributes:
        features: channels of the output.
        pool: whether the image is halved.
        compute: dtype and convolution of the layers.
    """

    features: int
    pool: bool
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images or features (batch, height, width, channels) to features."""
        x = conv(self.compute, self.features, 3, 1, 'conv')(x)
        x = nn.relu(batch_norm(self.compute, train, 'norm')(x))
        return nn.max_pool(x, (2, 2), strides=(2, 2)) if self.pool else x


class Head(nn.Module):
    """A dense layer on all pixels and channels; logits are float32."""

    num_classes: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to logits (batch, classes)."""
        del train
        # Channels before pixels, PyTorch's order, for compatibility with its dense weights.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, dtype=self.compute.dtype, name='dense')(x).astype(jnp.float32)
