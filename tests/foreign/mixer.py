"""An MLP-Mixer: nothing in it computes something else in training, so that it has no argument for that."""

import flax.linen as nn
import jax.numpy as jnp


class MlpBlock(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.mlp_dim)(x)))


class MixerBlock(nn.Module):
    tokens_mlp_dim: int
    channels_mlp_dim: int

    @nn.compact
    def __call__(self, x):
        y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
        y = MlpBlock(self.tokens_mlp_dim, name='token_mixing')(y)
        x = x + jnp.swapaxes(y, 1, 2)
        return x + MlpBlock(self.channels_mlp_dim, name='channel_mixing')(nn.LayerNorm()(x))


class Mixer(nn.Module):
    num_classes: int = 3
    num_blocks: int = 2
    hidden: int = 8

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(self.hidden, (4, 4), (4, 4), name='stem')(images)
        x = x.reshape(x.shape[0], -1, self.hidden)
        for number in range(self.num_blocks):
            x = MixerBlock(4, 16, name=f'block{number}')(x)
        x = nn.LayerNorm(name='pre_head_norm')(x).mean(axis=1)
        return nn.Dense(self.num_classes, name='head', kernel_init=nn.initializers.normal(0.3))(x)
