"""Residual networks for small images: CIFAR ResNet-20, -32, -44, -56, -110 and shallower ones."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.chain import split_chain, stage_blocks
from bqat_jax.networks.layers import FLOAT32, Computation, batch_norm, block_class, computation, conv
from bqat_jax.networks.registry import register_network

NUM_STAGES = 3
SHORTCUTS = ('A', 'B')


@register_network('cifar_resnet')
def cifar_resnet(
    num_classes: int,
    *,
    depth: int,
    width: int = 16,
    shortcut: str = 'A',
    preactivation: bool = False,
    dtype: str = 'float32',
    remat: bool = False,
    cut: str = 'stage',
    conv_general_dilated: Callable[..., jax.Array] | None = None,
) -> BlockNetwork:
    """Returns a ResNet of depth 6n + 2 for small images (He et al., arXiv 1512.03385, section 4.2).

    Three stages of n residual blocks with 1, 2 and 4 times `width` channels; the second and third stage halve the
    image. Parts: stem, stage1_block1, ..., head.

    Args:
        num_classes: number of logits.
        depth: 6n + 2.
        width: channels of the first stage.
        shortcut: where the shape changes, 'A' subsamples and pads channels with zeros, half of them on each side; 'B'
            is a 1×1 convolution, with batch norm unless `preactivation`.
        preactivation: whether batch norm and ReLU precede each convolution (He et al., arXiv 1603.05027).
        dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters are float32.
        remat: whether blocks recompute their activations in the backward pass.
        cut: 'stage', 'block' or names of blocks, see `blocks.chain.split_chain`.
        conv_general_dilated: computes the convolutions; None for Linen's default.

    Raises:
        ValueError: for a depth that is not 6n + 2, or another invalid value.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f'depth={depth}: a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, 44, 56, 110).')
    if shortcut not in SHORTCUTS:
        raise ValueError(f'shortcut={shortcut!r}: must be one of {", ".join(SHORTCUTS)}.')
    compute = computation(dtype, conv_general_dilated)
    block = block_class(PreactivationBlock if preactivation else ResidualBlock, remat)
    stages = []
    for number in range(NUM_STAGES):
        strides = [2 if number else 1] + [1] * ((depth - 2) // 6 - 1)
        makes = [partial(block, width * 2**number, stride, shortcut, compute) for stride in strides]
        if preactivation and number == 0:  # The first activation replaces the stem's, so the shortcut needs it too.
            makes[0] = partial(makes[0], activate_shortcut=True)
        stages.append(stage_blocks(number + 1, makes))
    return split_chain(
        partial(Stem, width, compute, activate=not preactivation),
        stages,
        partial(Head, num_classes, compute, activate=preactivation),
        cut,
    )


class Stem(nn.Module):
    """3×3 convolution, then batch norm and ReLU if `activate`."""

    features: int
    compute: Computation = FLOAT32
    activate: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to features."""
        x = conv(self.compute, self.features, 3, 1, 'conv')(x)
        return nn.relu(batch_norm(self.compute, train, 'norm')(x)) if self.activate else x


def _pad_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Returns shortcut A: every stride-th pixel, with zero channels on both sides."""
    missing = features - x.shape[-1]
    return jnp.pad(x[:, ::stride, ::stride, :], ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut (He et al., arXiv 1512.03385, section 4.2).

    Attributes:
        features: channels of the output.
        stride: stride of the first convolution.
        shortcut: 'A' or 'B', see `cifar_resnet`.
        compute: dtype and convolution of the layers.
    """

    features: int
    stride: int
    shortcut: str
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to features."""
        norm, convolution = partial(batch_norm, self.compute, train), partial(conv, self.compute)
        y = nn.relu(norm('norm1')(convolution(self.features, 3, self.stride, 'conv1')(x)))
        y = norm('norm2')(convolution(self.features, 3, 1, 'conv2')(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == 'A':
                x = _pad_shortcut(x, self.features, self.stride)
            else:
                x = norm('shortcut_norm')(convolution(self.features, 1, self.stride, 'shortcut_conv')(x))
        return nn.relu(y + x)


class PreactivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3×3 convolutions (He et al., arXiv 1603.05027, figure 1b).

    Attributes:
        features: channels of the output.
        stride: stride of the first convolution.
        shortcut: 'A' or 'B', see `cifar_resnet`.
        compute: dtype and convolution of the layers.
        activate_shortcut: whether the shortcut starts after the first ReLU, as in the network's first block.
    """

    features: int
    stride: int
    shortcut: str
    compute: Computation = FLOAT32
    activate_shortcut: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to features."""
        norm, convolution = partial(batch_norm, self.compute, train), partial(conv, self.compute)
        active = nn.relu(norm('norm1')(x))
        y = convolution(self.features, 3, self.stride, 'conv1')(active)
        y = convolution(self.features, 3, 1, 'conv2')(nn.relu(norm('norm2')(y)))
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == 'A':
                x = _pad_shortcut(active, self.features, self.stride)
            else:
                x = convolution(self.features, 1, self.stride, 'shortcut_conv')(active)
        elif self.activate_shortcut:
            x = active
        return y + x


class Head(nn.Module):
    """Batch norm and ReLU if `activate`, mean over the image, then a dense layer; logits are float32."""

    num_classes: int
    compute: Computation = FLOAT32
    activate: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to logits (batch, classes)."""
        if self.activate:
            x = nn.relu(batch_norm(self.compute, train, 'norm')(x))
        x = nn.Dense(self.num_classes, dtype=self.compute.dtype, name='dense')(jnp.mean(x, axis=(1, 2)))
        return x.astype(jnp.float32)
