"""A residual network as a stranger writes it: its file knows nothing of this project."""

import flax.linen as nn


class Block(nn.Module):
    """Two convolutions around a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train)(y))
        return nn.Conv(self.features, (3, 3))(y) + nn.Conv(self.features, (1, 1), self.stride)(x)


class Network(nn.Module):
    """Three blocks with ReLUs between them, all in one compact method."""

    num_classes: int = 5

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        for number in range(3):
            x = nn.relu(Block(4 * 2**number, 1 + (number > 0), name=f'layer{number}')(x, train))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
