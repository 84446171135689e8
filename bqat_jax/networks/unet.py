"""A small UNet: logits for every pixel of an image."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.chain import CUTS
from bqat_jax.blocks.switch import make_call
from bqat_jax.networks.layers import FLOAT32, Computation, batch_norm, computation, conv
from bqat_jax.networks.registry import register_network


@register_network('unet')
def unet(
    num_classes: int,
    *,
    width: int = 16,
    levels: int = 2,
    dtype: str = 'float32',
    cut: str = 'stage',
) -> BlockNetwork:
    """Returns a UNet (Ronneberger et al., arXiv 1505.04597) with batch norm and padded convolutions.

    Each level of the encoder halves the image and doubles the channels; a level of the decoder concatenates its input
    with the encoder's features. Parts: down1, .., bottom, .., up1, head. Cuts carry the skip connections.

    Args:
        num_classes: number of logits per pixel.
        width: channels of the first level.
        levels: number of times the image is halved; 2^levels must divide its sides.
        dtype: dtype of the computation, 'float32' or 'bfloat16'; parameters and batch norm are float32.
        cut: 'stage' (encoder, bottom, decoder), 'block' (one level each) or names of parts.

    Raises:
        ValueError: for an invalid value.
    """
    if levels < 1:
        raise ValueError(f'levels={levels}: must be at least 1.')
    names = (
        *(f'down{level}' for level in range(1, levels + 1)),
        'bottom',
        *(f'up{level}' for level in range(levels, 0, -1)),
    )
    ends = tuple(name.strip() for name in cut.split(','))
    if cut in CUTS:
        ends = names if cut == 'block' else (f'down{levels}', 'bottom', 'up1')
    if any(end not in names for end in ends):
        raise ValueError(f'cut={cut!r}: must be one of {", ".join(CUTS)}, or some of these: {", ".join(names)}.')
    module = UNet(num_classes, width, levels, computation(dtype, None))
    return BlockNetwork(module, ends, make_call(module))


class UNet(nn.Module):
    """See `unet`."""

    num_classes: int
    width: int
    levels: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images (batch, height, width, channels) to logits, float32 (batch, height, width, classes)."""
        size = 2**self.levels
        if x.shape[1] % size or x.shape[2] % size:
            raise ValueError(f'Images of {x.shape[1]} by {x.shape[2]} cannot be halved {self.levels} times.')
        skips = []
        for level in range(1, self.levels + 1):
            x = Level(self.width * 2 ** (level - 1), self.compute, name=f'down{level}')(x, train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = Level(self.width * size, self.compute, name='bottom')(x, train)
        for level in range(self.levels, 0, -1):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = jnp.concatenate([x, skips[level - 1]], axis=-1)
            x = Level(self.width * 2 ** (level - 1), self.compute, name=f'up{level}')(x, train)
        return nn.Conv(self.num_classes, (1, 1), dtype=self.compute.dtype, name='head')(x).astype(jnp.float32)


class Level(nn.Module):
    """Two 3×3 convolutions, each with batch norm and ReLU."""

    features: int
    compute: Computation = FLOAT32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps features (batch, height, width, channels) to features."""
        for number in (1, 2):
            x = conv(self.compute, self.features, 3, 1, f'conv{number}')(x)
            x = nn.relu(batch_norm(self.compute, train, f'norm{number}')(x))
        return x
