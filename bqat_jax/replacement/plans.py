"""Replacement plans: which blocks of each mixed-precision (MP) model of a training step are low precision.

A plan says it with a mask m[k, i]: true where block i of MP model k is low precision (LP), false where it is the full-
precision (FP) partner's. `prefix` is the reading of arXiv 2412.15846 that this project starts from, with the LP blocks
first, as in the same team's arXiv 2411.01547. `prefix_sampled` is ours: the same expected loss at a cost that does not
grow with the number of blocks.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

PLANS = ('none', 'prefix', 'prefix_sampled')
PATH_WEIGHTS = ('halving', 'uniform', 'mean')


def prefix_weights(name: str, num_blocks: int) -> tuple[float, ...]:
    """Returns the loss weights w_i of the MP models with i = 1 .. n-1 leading LP blocks, for n blocks.

    Args:
        name: 'halving', w_i = 1 / 2^(n-i) (Block-KD, arXiv 2411.01547); 'uniform', w_i = 1; 'mean',
            w_i = 1 / (n-1) (both ours).
        num_blocks: n.

    Raises:
        ValueError: for another name.
    """
    count = num_blocks - 1
    if name == 'halving':
        return tuple(0.5 ** (num_blocks - i) for i in range(1, num_blocks))
    if name == 'uniform':
        return (1.0,) * count
    if name == 'mean':
        return (1.0 / count,) * count
    raise ValueError(f'replacement weights {name!r}: they must be one of {", ".join(PATH_WEIGHTS)}.')


@dataclasses.dataclass(frozen=True)
class Plan:
    """A replacement plan for a network of n blocks.

    Attributes:
        name: 'none', no MP model; 'prefix', all n-1 models with i leading LP blocks, every step; 'prefix_sampled',
            `num_sampled` of those drawn per step without replacement, all equally likely.
        weights: w_i for i = 1 .. n-1, the loss weight of the model with i leading LP blocks.
        num_sampled: models drawn per step; 'prefix_sampled' alone reads it.

    Raises:
        ValueError: for a name that does not exist, or more draws than there are models.
    """

    name: str
    weights: tuple[float, ...]
    num_sampled: int = 1

    def __post_init__(self):
        if self.name not in PLANS:
            raise ValueError(f'replacement plan {self.name!r}: it must be one of {", ".join(PLANS)}.')
        if self.name != 'none' and not self.weights:
            raise ValueError(
                f'replacement plan {self.name!r} needs a network of at least two blocks: with one there is no mixed-'
                "precision model. Cut the network finer (replacement.cut='block') or use the plan 'none'."
            )
        if self.is_sampled and not 1 <= self.num_sampled <= len(self.weights):
            raise ValueError(
                f'replacement.paths={self.num_sampled}: of {self.num_blocks} blocks 1 to {len(self.weights)} '
                'prefixes can be drawn.'
            )

    @property
    def num_blocks(self) -> int:
        """n."""
        return len(self.weights) + 1

    @property
    def num_paths(self) -> int:
        """MP models per step."""
        return {'none': 0, 'prefix': len(self.weights), 'prefix_sampled': self.num_sampled}[self.name]

    @property
    def is_sampled(self) -> bool:
        """Whether the mask is drawn at run time, rather than known when the step is traced."""
        return self.name == 'prefix_sampled'

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws the MP models of one step.

        Args:
            key: random key, the same on every host.

        Returns:
            The mask, bool (paths, blocks), and the loss weights of the paths, float32 (paths,), scaled so that their
            expectation is that of plan 'prefix'.
        """
        if self.is_sampled:
            # Without replacement each prefix is drawn with probability k / (n-1).
            chosen = jax.random.choice(key, len(self.weights), (self.num_sampled,), replace=False)
            scale = len(self.weights) / self.num_sampled
        else:
            chosen, scale = jnp.arange(self.num_paths), 1.0
        return self._describe(chosen, scale)

    def outcomes(self) -> Iterator[tuple[float, jax.Array, jax.Array]]:
        """Yields every draw there can be, up to the order of paths: its probability, mask and loss weights."""
        if not self.is_sampled:
            yield 1.0, *self.draw(jax.random.key(0))
            return
        draws = list(itertools.combinations(range(len(self.weights)), self.num_sampled))
        for chosen in draws:
            yield 1.0 / len(draws), *self._describe(jnp.array(chosen), len(self.weights) / self.num_sampled)

    def _describe(self, chosen: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
        """Mask and weights of the models with chosen + 1 leading LP blocks."""
        mask = jnp.arange(self.num_blocks)[None, :] <= chosen[:, None]
        return mask, jnp.asarray(self.weights, jnp.float32)[chosen] * scale
