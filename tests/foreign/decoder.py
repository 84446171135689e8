"""A decoder (GPT) whose layers are scanned: tokens in, logits of the next token out."""

import flax.linen as nn
import jax.numpy as jnp


class DecoderLayer(nn.Module):
    heads: int
    dropout_rate: float

    @nn.compact
    def __call__(self, x, mask, deterministic):
        y = nn.RMSNorm()(x)
        q, k, v = (nn.DenseGeneral((self.heads, x.shape[-1] // self.heads), name=name)(y) for name in 'qkv')
        y = nn.dot_product_attention(q, k, v, mask=mask)
        y = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name='o')(y)
        x = x + nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)
        y = nn.RMSNorm()(x)
        y = nn.silu(nn.Dense(2 * x.shape[-1], use_bias=False, name='gate')(y)) * nn.Dense(
            2 * x.shape[-1], use_bias=False, name='up'
        )(y)
        return x + nn.Dense(x.shape[-1], use_bias=False, name='down')(y), None


class Decoder(nn.Module):
    vocab_size: int = 13
    width: int = 8
    num_layers: int = 3
    heads: int = 2
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, tokens, deterministic=True):
        embed = nn.Embed(self.vocab_size, self.width, name='embed')
        x = embed(tokens)
        mask = nn.make_causal_mask(tokens, dtype=jnp.bool_)
        layers = nn.scan(
            DecoderLayer,
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.num_layers,
        )
        x, _ = layers(self.heads, self.dropout_rate, name='layers')(x, mask, deterministic)
        return embed.attend(nn.RMSNorm(name='norm')(x))
