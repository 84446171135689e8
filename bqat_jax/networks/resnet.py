"""Residual networks for ImageNet: ResNet-18, -34, -50 and -101."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.chain import split_chain, stage_blocks
from bqat_jax.networks.layers import FLOAT32, Computation, batch_norm, block_class, computation, conv
from bqat_jax.networks.registry import register_network

# Blocks per stage (He et al., arXiv 1512.03385, table 1); networks of 50 and more layers have bottleneck blocks.
STAGE_SIZES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK_DEPTH = 50
EXPANSION = 4
POOL_PADDING: Any = ((1, 1), (1, 1))  # with -inf; equal on both sides, as in PyTorch


@register_network('resnet')
def resnet(
    num_classes: int,
    *,
    depth: int,
    width: int = 64,
    dtype: str = 'float32',
    remat: bool = False,
    cut: str = 'stage',
    conv_general_dilated: Callable[..., jax.Array] | None = None,
) -> BlockNetwork:
    """Returns a ResNet for ImageNet (He et al., arXiv 1512.03385, table 1).

    Four stages with 1, 2, 4 and 8 times `width` channels; outputs of bottleneck blocks have four times as many. As in
    PyTorch ("v1.5"), the 3×3 convolution of a bottleneck has the stride. Parts: stem, stage1_block1, ..., head.

    Args:
        num_classes: number of logits.
        depth: 18, 34, 50 or 101.
        width: channels of the stem.
        dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters are float32.
        remat: whether blocks recompute their activations in the backward pass.
        cut: 'stage', 'block' or names of blocks, see `blocks.chain.split_chain`.
        conv_general_dilated: computes the convolutions; None for Linen's default.

    Raises:
        ValueError: for an invalid depth or another invalid value.
    """
    if depth not in STAGE_SIZES:
        raise ValueError(f'depth={depth}: a ResNet for ImageNet has {", ".join(map(str, STAGE_SIZES))} layers.')
    compute = computation(dtype, conv_general_dilated)
    block = block_class(BottleneckBlock if depth >= BOTTLENECK_DEPTH else BasicBlock, remat)
    stages = []
    for number, size in enumerate(STAGE_SIZES[depth]):
        strides = [2 if number else 1] + [1] * (size - 1)
        stages.append(
            stage_blocks(number + 1, [partial(block, width * 2**number, stride, compute) for stride in strides])
        )
    return split_chain(partial(Stem, width, compute), stages, partial(Head, num_classes, compute), cut)


class Stem(nn.Module):
    """7×7 convolution of stride 2, batch norm, ReLU, 3×3 max pool of stride 2."""

    features: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to features."""
        x = conv(self.compute, self.features, 7, 2, 'conv')(x)
        x = nn.relu(batch_norm(self.compute, train, 'norm')(x))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=POOL_PADDING)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut, a 1×1 convolution where the shape changes.

    Attributes:
        features: channels of the output.
        stride: stride of the first convolution.
        compute: dtype and convolution of the layers.
    """

    features: int
    stride: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to features."""
        norm, convolution = partial(batch_norm, self.compute, train), partial(conv, self.compute)
        y = nn.relu(norm('norm1')(convolution(self.features, 3, self.stride, 'conv1')(x)))
        y = norm('norm2')(convolution(self.features, 3, 1, 'conv2')(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm('shortcut_norm')(convolution(self.features, 1, self.stride, 'shortcut_conv')(x))
        return nn.relu(y + x)


class BottleneckBlock(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with batch norm and a shortcut, a 1×1 convolution where the shape changes.

    Attributes:
        features: channels of the 3×3 convolution; the output has four times as many.
        stride: stride of the 3×3 convolution.
        compute: dtype and convolution of the layers.
    """

    features: int
    stride: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to features."""
        norm, convolution = partial(batch_norm, self.compute, train), partial(conv, self.compute)
        outputs = EXPANSION * self.features
        y = nn.relu(norm('norm1')(convolution(self.features, 1, 1, 'conv1')(x)))
        y = nn.relu(norm('norm2')(convolution(self.features, 3, self.stride, 'conv2')(y)))
        y = norm('norm3')(convolution(outputs, 1, 1, 'conv3')(y))
        if self.stride != 1 or x.shape[-1] != outputs:
            x = norm('shortcut_norm')(convolution(outputs, 1, self.stride, 'shortcut_conv')(x))
        return nn.relu(y + x)


class Head(nn.Module):
    """Mean over the image, then a dense layer; logits are float32."""

    num_classes: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to logits (batch, classes)."""
        del train
        x = nn.Dense(self.num_classes, dtype=self.compute.dtype, name='dense')(jnp.mean(x, axis=(1, 2)))
        return x.astype(jnp.float32)
