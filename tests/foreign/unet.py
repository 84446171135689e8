"""A UNet for segmentation: an image in, logits for each pixel out."""

import flax.linen as nn
import jax.numpy as jnp


class DoubleConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train: bool):
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return x


class UNet(nn.Module):
    num_classes: int = 2
    features: tuple = (4,)

    @nn.compact
    def __call__(self, image, train: bool = False):
        x, skips = image, []
        for level, features in enumerate(self.features):
            x = DoubleConv(features, name=f'down{level}')(x, train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = DoubleConv(6, name='bottleneck')(x, train)
        for level, features in reversed(list(enumerate(self.features))):
            x = nn.ConvTranspose(features, (2, 2), (2, 2))(x)
            x = DoubleConv(features, name=f'up{level}')(jnp.concatenate([x, skips[level]], axis=-1), train)
        return nn.Conv(self.num_classes, (1, 1), name='classes')(x)
