"""Residual networks for small images: CIFAR ResNet-20, -32, -44, -56, -110 and their shallower relatives."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.networks.cut import CutNetwork

NUM_STAGES = 3
CUTS = ('stage', 'block')
SHORTCUTS = ('A', 'B')
# PyTorch's defaults, with which the public weights were made; Linen counts the momentum the other way round.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5


def _conv(features: int, kernel: int, stride: int, name: str) -> nn.Conv:
    # Symmetric padding, as in PyTorch: 'SAME' pads only one side of an even-sized image at stride 2.
    padding = kernel // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=((padding, padding), (padding, padding)),
        use_bias=False,
        kernel_init=nn.initializers.kaiming_normal(),
        name=name,
    )


def _batch_norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(
        use_running_average=not train, momentum=BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON, name=name
    )


class Stem(nn.Module):
    """3×3 convolution, batch norm, ReLU."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to features."""
        return nn.relu(_batch_norm(train, 'norm')(_conv(self.features, 3, 1, 'conv')(x)))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm around a shortcut (He et al., arXiv 1512.03385, section 4.2).

    Attributes:
        features: channels of the output.
        stride: of the first convolution.
        shortcut: where the shape changes, 'A' subsamples and pads channels with zeros, half of them on each side;
            'B' is a 1×1 convolution with batch norm.
    """

    features: int
    stride: int
    shortcut: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to features."""
        y = nn.relu(_batch_norm(train, 'norm1')(_conv(self.features, 3, self.stride, 'conv1')(x)))
        y = _batch_norm(train, 'norm2')(_conv(self.features, 3, 1, 'conv2')(y))
        if self.stride != 1 or x.shape[-1] != self.features:
            if self.shortcut == 'A':
                x = x[:, :: self.stride, :: self.stride, :]
                missing = self.features - x.shape[-1]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
            else:
                x = _conv(self.features, 1, self.stride, 'shortcut_conv')(x)
                x = _batch_norm(train, 'shortcut_norm')(x)
        return nn.relu(y + x)


class Head(nn.Module):
    """Mean over the image, then a dense layer."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to logits (batch, classes)."""
        del train
        return nn.Dense(self.num_classes, name='dense')(jnp.mean(x, axis=(1, 2)))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images (He et al., arXiv 1512.03385, section 4.2).

    Three stages of n residual blocks with 1, 2 and 4 times `width` channels; the second and third stage halve the
    image. Submodules: stem, stage1_block1, ..., head.

    Attributes:
        depth: 6n + 2.
        num_classes: number of logits.
        width: channels of the first stage.
        shortcut: 'A' (no parameters) or 'B' (1×1 convolution).

    Raises:
        ValueError: for a depth that is not 6n + 2, or a shortcut that does not exist.
    """

    depth: int
    num_classes: int
    width: int = 16
    shortcut: str = 'A'

    def __post_init__(self):
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f'depth={self.depth}: a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 32, 44, 56, 110).')
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f'shortcut={self.shortcut!r}: it must be one of {", ".join(SHORTCUTS)}.')
        super().__post_init__()

    @property
    def blocks_per_stage(self) -> int:
        """Residual blocks in each stage."""
        return (self.depth - 2) // 6

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """For each stage the names of its residual blocks."""
        return tuple(
            tuple(f'stage{stage}_block{block}' for block in range(1, self.blocks_per_stage + 1))
            for stage in range(1, NUM_STAGES + 1)
        )

    def setup(self):
        """Makes the submodules."""
        self.stem = Stem(self.width)
        for number, names in enumerate(self.stages):
            for position, name in enumerate(names):
                stride = 2 if number > 0 and position == 0 else 1
                setattr(self, name, ResidualBlock(self.width * 2**number, stride, self.shortcut))
        self.head = Head(self.num_classes)

    def run(self, x: jax.Array, names: Sequence[str], train: bool) -> jax.Array:
        """Runs the submodules called `names`, one after another."""
        for name in names:
            x = getattr(self, name)(x, train)
        return x

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits (batch, classes)."""
        return self.run(x, ('stem', *sum(self.stages, ()), 'head'), train)

    def cut(self, granularity: str) -> CutNetwork:
        """Returns this network cut into one block per stage or per residual block.

        Raises:
            ValueError: for a granularity that is neither 'stage' nor 'block'.
        """
        if granularity not in CUTS:
            raise ValueError(f'cut={granularity!r}: it must be one of {", ".join(CUTS)}.')
        blocks = self.stages if granularity == 'stage' else tuple((name,) for name in sum(self.stages, ()))
        return CutNetwork(module=self, stem=('stem',), blocks=blocks, head=('head',))
