"""An EfficientNet: inverted bottlenecks with squeeze-and-excitation and batch norm."""

from functools import partial

import flax.linen as nn


class SqueezeExcite(nn.Module):
    reduced: int

    @nn.compact
    def __call__(self, x):
        s = x.mean((1, 2), keepdims=True)
        s = nn.swish(nn.Conv(self.reduced, (1, 1), name='reduce')(s))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1), name='expand')(s))


class MBConv(nn.Module):
    features: int
    expand: int
    stride: int
    drop: float = 0.2

    @nn.compact
    def __call__(self, inputs, is_training):
        norm = partial(nn.BatchNorm, use_running_average=not is_training, momentum=0.9)
        conv = partial(nn.Conv, use_bias=False)
        inner = inputs.shape[-1] * self.expand
        x = inputs
        if self.expand > 1:
            x = nn.swish(norm()(conv(inner, (1, 1))(x)))
        x = conv(inner, (3, 3), (self.stride, self.stride), feature_group_count=inner)(x)
        x = nn.swish(norm()(x))
        x = SqueezeExcite(max(1, inputs.shape[-1] // 2))(x)
        x = norm()(conv(self.features, (1, 1))(x))
        if self.stride == 1 and inputs.shape == x.shape:
            x = inputs + nn.Dropout(self.drop, broadcast_dims=(1, 2, 3))(x, deterministic=not is_training)
        return x


class EfficientNet(nn.Module):
    num_classes: int = 3

    def setup(self):
        self.stem = nn.Conv(4, (3, 3), (2, 2), use_bias=False)
        self.stem_norm = nn.BatchNorm()
        self.blocks = [MBConv(4, 1, 2), MBConv(4, 2, 1)]
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Dense(self.num_classes)

    def __call__(self, x, *, is_training: bool):
        x = nn.swish(self.stem_norm(self.stem(x), use_running_average=not is_training))
        for block in self.blocks:
            x = block(x, is_training)
        return self.head(self.dropout(x.mean((1, 2)), deterministic=not is_training))
