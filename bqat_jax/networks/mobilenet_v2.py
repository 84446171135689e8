"""MobileNetV2: inverted residuals with depthwise convolutions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.chain import split_chain, stage_blocks
from bqat_jax.networks.layers import (
    BATCH_NORM_EPSILON,
    BATCH_NORM_MOMENTUM,
    FLOAT32,
    Computation,
    batch_norm,
    block_class,
    computation,
    conv,
    depthwise_init,
)
from bqat_jax.networks.registry import register_network

# Expansion, channels, blocks and first stride of each stage (Sandler et al., arXiv 1801.04381, table 2).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_WIDTH, HEAD_WIDTH = 32, 1280
CHANNEL_MULTIPLE = 8
# Padding of convolutions: as in PyTorch, equal on both sides; or as in TensorFlow, at the end of an even-sized image.
PADDINGS = {'torch': None, 'tf': 'SAME'}


@register_network('mobilenet_v2')
def mobilenet_v2(
    num_classes: int,
    *,
    width_multiplier: float = 1.0,
    padding: str = 'torch',
    norm_epsilon: float = BATCH_NORM_EPSILON,
    norm_momentum: float = BATCH_NORM_MOMENTUM,
    dtype: str = 'float32',
    remat: bool = False,
    cut: str = 'stage',
    conv_general_dilated: Callable[..., jax.Array] | None = None,
) -> BlockNetwork:
    """Returns MobileNetV2 (Sandler et al., arXiv 1801.04381, table 2).

    Seventeen inverted residuals in seven stages; the stem and four of the stages halve the image. Parts: stem,
    stage1_block1, ..., head. Weights trained in TensorFlow, including Hugging Face's, need padding='tf' and
    norm_epsilon=0.001.

    Args:
        num_classes: number of logits.
        width_multiplier: factor of all channels; the head has at least 1280.
        padding: padding of the convolutions, 'torch' (equal on both sides) or 'tf' (SAME).
        norm_epsilon: epsilon of batch norm.
        norm_momentum: weight of the running statistics in an update of batch norm.
        dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters are float32.
        remat: whether blocks recompute their activations in the backward pass.
        cut: 'stage', 'block' or names of blocks, see `blocks.chain.split_chain`.
        conv_general_dilated: computes the convolutions; None for Linen's default.

    Raises:
        ValueError: for an invalid value.
    """
    if padding not in PADDINGS:
        raise ValueError(f'padding={padding!r}: must be one of {", ".join(PADDINGS)}.')
    if width_multiplier <= 0:
        raise ValueError(f'width_multiplier={width_multiplier}: must be positive.')
    compute = computation(dtype, conv_general_dilated)
    layer = partial(ConvNorm, padding=PADDINGS[padding], momentum=norm_momentum, epsilon=norm_epsilon, compute=compute)
    block = block_class(InvertedResidual, remat)
    stages = []
    for number, (expansion, channels, size, stride) in enumerate(STAGES, 1):
        features = make_divisible(channels * width_multiplier)
        strides = [stride] + [1] * (size - 1)
        stages.append(stage_blocks(number, [partial(block, layer, expansion, features, one) for one in strides]))
    return split_chain(
        partial(layer, make_divisible(STEM_WIDTH * width_multiplier), 3, 2),
        stages,
        partial(Head, layer, make_divisible(HEAD_WIDTH * max(1.0, width_multiplier)), num_classes, compute),
        cut,
    )


def make_divisible(channels: float, multiple: int = CHANNEL_MULTIPLE) -> int:
    """Returns the multiple of `multiple` nearest to `channels`, but at least 0.9 · `channels`."""
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * channels else rounded


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and ReLU6 if `activate`; the stem is a `ConvNorm` of stride 2.

    Attributes:
        features: output channels.
        kernel: size of the kernel.
        stride: stride of the convolution.
        groups: number of channel groups.
        activate: whether ReLU6 follows.
        padding: padding of the convolution; None for kernel // 2 pixels on each side.
        momentum: momentum of batch norm.
        epsilon: epsilon of batch norm.
        compute: dtype and convolution of the layers.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activate: bool = True
    padding: Any = None
    momentum: float = BATCH_NORM_MOMENTUM
    epsilon: float = BATCH_NORM_EPSILON
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images or features (batch, height, width, channels) to features."""
        options: dict[str, Any] = {} if self.padding is None else {'padding': self.padding}
        if self.groups != 1:
            options |= {'feature_group_count': self.groups, 'kernel_init': depthwise_init}
        x = conv(self.compute, self.features, self.kernel, self.stride, 'conv', **options)(x)
        x = batch_norm(self.compute, train, 'norm', momentum=self.momentum, epsilon=self.epsilon)(x)
        return nn.relu6(x) if self.activate else x


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise convolution and linear 1×1 projection, with a shortcut if the shape does not change.

    Attributes:
        layer: constructor of a `ConvNorm`.
        expansion: channels of the depthwise convolution divided by those of the input; 1 omits the 1×1 expansion.
        features: channels of the output.
        stride: stride of the depthwise convolution.
    """

    layer: Callable[..., ConvNorm]
    expansion: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to features."""
        inside, y = self.expansion * x.shape[-1], x
        if self.expansion != 1:
            y = self.layer(inside, name='expand')(y, train)
        y = self.layer(inside, 3, self.stride, groups=inside, name='depthwise')(y, train)
        y = self.layer(self.features, activate=False, name='project')(y, train)
        return x + y if x.shape == y.shape else y


class Head(nn.Module):
    """1×1 convolution with batch norm and ReLU6, mean over the image, then a dense layer; logits are float32."""

    layer: Callable[..., ConvNorm]
    features: int
    num_classes: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to logits (batch, classes)."""
        x = jnp.mean(self.layer(self.features, name='last')(x, train), axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.compute.dtype, name='dense')(x).astype(jnp.float32)
