"""A tagger of words: two bidirectional LSTMs over sentences of different lengths."""

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
        for number, cell in enumerate((nn.OptimizedLSTMCell, nn.LSTMCell)):
            both = nn.Bidirectional(nn.RNN(cell(self.hidden)), nn.RNN(cell(self.hidden)), name=f'lstm{number}')
            x = both(x, seq_lengths=lengths)
        return nn.Dense(self.num_tags, name='tags')(x)
