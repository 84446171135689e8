"""A ConvNeXt: depthwise convolutions, layer scale, and stochastic depth from a random stream of its own."""

import flax.linen as nn
import jax


class DropPath(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, deterministic):
        if deterministic or self.rate == 0:
            return x
        keep = jax.random.bernoulli(self.make_rng('drop_path'), 1 - self.rate, (x.shape[0], 1, 1, 1))
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    drop_path: float

    @nn.compact
    def __call__(self, x, train):
        width = x.shape[-1]
        y = nn.Conv(width, (7, 7), feature_group_count=width, name='dwconv')(x)
        y = nn.LayerNorm(epsilon=1e-6, name='norm')(y)
        y = nn.Dense(width, name='pwconv2')(nn.gelu(nn.Dense(4 * width, name='pwconv1')(y)))
        y = y * self.param('gamma', nn.initializers.constant(0.1), (width,))
        return x + DropPath(self.drop_path)(y, deterministic=not train)


class ConvNeXt(nn.Module):
    num_classes: int = 3
    depths: tuple = (1, 1)
    widths: tuple = (4, 6)
    drop_path: float = 0.3

    @nn.compact
    def __call__(self, x, train: bool = False):
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            size = 2
            if stage > 0:
                x = nn.LayerNorm(epsilon=1e-6)(x)
            x = nn.Conv(width, (size, size), (size, size), name=f'downsample{stage}')(x)
            for number in range(depth):
                x = Block(self.drop_path * (stage + number + 1) / 2, name=f'stage{stage}_block{number}')(x, train)
        return nn.Dense(self.num_classes, name='head')(nn.LayerNorm()(x.mean((1, 2))))
