"""An encoder of text (BERT): tokens and a padding mask in, one class for each text out."""

import flax.linen as nn
import jax.numpy as jnp


class EncoderLayer(nn.Module):
    heads: int
    mlp_dim: int
    dropout_rate: float

    @nn.compact
    def __call__(self, hidden, attention_mask, deterministic):
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, dropout_rate=self.dropout_rate, deterministic=deterministic, name='attention'
        )
        attended = attention(hidden, mask=attention_mask)
        attended = nn.Dropout(self.dropout_rate)(attended, deterministic=deterministic)
        hidden = nn.LayerNorm(epsilon=1e-12, name='attention_norm')(hidden + attended)
        inner = nn.gelu(nn.Dense(self.mlp_dim, name='intermediate')(hidden), approximate=False)
        inner = nn.Dense(hidden.shape[-1], name='output')(inner)
        inner = nn.Dropout(self.dropout_rate)(inner, deterministic=deterministic)
        return nn.LayerNorm(epsilon=1e-12, name='output_norm')(hidden + inner)


class Bert(nn.Module):
    vocab_size: int = 17
    hidden_size: int = 8
    num_layers: int = 2
    num_heads: int = 2
    max_length: int = 16
    num_classes: int = 3
    dropout_rate: float = 0.1

    def setup(self):
        self.token_embeddings = nn.Embed(self.vocab_size, self.hidden_size)
        self.position_embeddings = self.param(
            'position_embeddings', nn.initializers.normal(0.02), (self.max_length, self.hidden_size)
        )
        self.norm = nn.LayerNorm()
        self.layers = [
            EncoderLayer(self.num_heads, 2 * self.hidden_size, self.dropout_rate) for _ in range(self.num_layers)
        ]
        self.pooler = nn.Dense(self.hidden_size)
        self.classifier = nn.Dense(self.num_classes)

    def __call__(self, input_ids, attention_mask, deterministic=True):
        positions = self.position_embeddings[: input_ids.shape[-1]]
        hidden = self.norm(self.token_embeddings(input_ids) + positions)
        mask = nn.make_attention_mask(jnp.ones_like(attention_mask), attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, mask, deterministic)
        return self.classifier(nn.tanh(self.pooler(hidden[:, 0])))
