"""A tagger of words: a bidirectional and a plain LSTM over sentences of different lengths."""

import flax.linen as nn


class Tagger(nn.Module):
    vocab_size: int = 11
    hidden: int = 4
    num_tags: int = 3
    training: bool = False

    @nn.compact
    def __call__(self, words, lengths):
        x = nn.Embed(self.vocab_size, 6)(words)
        x = nn.Dropout(0.1, deterministic=not self.training)(x)
        forward, backward = nn.RNN(nn.OptimizedLSTMCell(self.hidden)), nn.RNN(nn.OptimizedLSTMCell(self.hidden))
        x = nn.Bidirectional(forward, backward, name='lstm0')(x, seq_lengths=lengths)
        x = nn.RNN(nn.LSTMCell(self.hidden), name='lstm1')(x, seq_lengths=lengths)
        return nn.Dense(self.num_tags, name='tags')(x)
