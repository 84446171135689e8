"""Replacement plans: which blocks of each mixed-precision (MP) model of a training step are low precision.

A plan says it with a mask m[k, i]: true where block i of MP model k is low precision (LP), false where it is the full-
precision (FP) partner's. The head of every MP model is the partner's (ours).

    none            no MP model: plain quantization-aware training, or distillation
    prefix          all n-1 models whose first blocks are LP, every step (arXiv 2411.01547, by the same team)
    single          all n models with one LP block, every step: the other reading of "replacement on the FP model"
    suffix          all n-1 models whose last blocks are LP, every step: an ablation (ours)
    prefix_sampled  k of `prefix`'s models, drawn per step, weighted so that the expected loss is the same (ours)
    single_sampled  k of `single`'s models, drawn and weighted in the same way (ours)
    bernoulli       k models; each block is LP with a probability that may change over training, as in the module
                    replacing of BERT-of-Theseus (arXiv 2002.02925)

That MP models come from block-by-block replacement on the FP model, and run beside the LP network, is arXiv
2412.15846's.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from bqat_jax.registry import Names
from bqat_jax.replacement.schedules import ALWAYS, Linear, Schedule

Model = tuple[bool, ...]

PLANS = Names('replacement plan')
DRAWN: set[str] = set()  # the names of those that draw
PATH_WEIGHTS = ('halving', 'uniform', 'mean')
# Plans to which a model of LP blocks alone, with the partner's head, can be added.
WITH_LAST = ('prefix', 'prefix_sampled')
# Theseus' schedule: from one half to one.
HALF_TO_ONE = Linear(start=0.5, end=1.0)


def register_plan(name: str, *, is_drawn: bool = False) -> Callable[[Callable], Callable]:
    """Returns a decorator that makes a replacement plan known by `name`.

    It decorates a function that takes the number of blocks and returns the plan's MP models, each a tuple with one bool
    per block, true where the block is LP.

    Args:
        name: as `config.replacement.plan` gives it.
        is_drawn: whether each step draws some of the models, rather than running all of them. A drawn plan without
            models draws every block of a mask, LP with `Plan.probability`.

    Raises:
        ValueError: if the name belongs to a function of another module.
    """

    def decorate(models: Callable[[int], Sequence[Model]]) -> Callable[[int], Sequence[Model]]:
        PLANS.register(name)(models)
        (DRAWN.add if is_drawn else DRAWN.discard)(name)
        return models

    return decorate


@register_plan('none')
def none(num_blocks: int) -> Sequence[Model]:
    """No model."""
    del num_blocks
    return ()


@register_plan('prefix')
def prefix(num_blocks: int) -> Sequence[Model]:
    """The first 1, 2, .. n-1 blocks are LP."""
    return tuple(tuple(i < count for i in range(num_blocks)) for count in range(1, num_blocks))


@register_plan('single')
def single(num_blocks: int) -> Sequence[Model]:
    """One block is LP, each in turn."""
    return tuple(tuple(i == chosen for i in range(num_blocks)) for chosen in range(num_blocks))


@register_plan('suffix')
def suffix(num_blocks: int) -> Sequence[Model]:
    """The last n-1, .. 2, 1 blocks are LP."""
    return tuple(tuple(i >= first for i in range(num_blocks)) for first in range(1, num_blocks))


@register_plan('prefix_sampled', is_drawn=True)
def prefix_sampled(num_blocks: int) -> Sequence[Model]:
    """The models of `prefix`."""
    return prefix(num_blocks)


@register_plan('single_sampled', is_drawn=True)
def single_sampled(num_blocks: int) -> Sequence[Model]:
    """The models of `single`."""
    return single(num_blocks)


@register_plan('bernoulli', is_drawn=True)
def bernoulli(num_blocks: int) -> Sequence[Model]:
    """Any mask may be drawn."""
    del num_blocks
    return ()


def parse_path_weights(text: str) -> str | tuple[float, ...]:
    """Returns the weights that a config names: 'halving', 'uniform', 'mean', or numbers separated by commas.

    Raises:
        ValueError: for anything else.
    """
    if text in PATH_WEIGHTS:
        return text
    try:
        return tuple(float(part) for part in text.split(','))
    except ValueError as error:
        raise ValueError(
            f'replacement.weights={text!r}: they must be one of {", ".join(PATH_WEIGHTS)}, or a number for each '
            "mixed-precision model, such as '0.25,0.5'."
        ) from error


@dataclasses.dataclass(frozen=True)
class Plan:
    """A replacement plan for a network of n blocks.

    Attributes:
        name: one of `PLANS`.
        num_blocks: n.
        weights: loss weights of the models: 'halving', 1/2^f for a model with f FP blocks, which for prefixes is
            Block-KD's 1/2^(n-i) (arXiv 2411.01547); 'uniform', 1; 'mean', 1 / their number (both ours); or a number for
            each model.
        num_sampled: models per step, for the plans that draw.
        include_last: adds the model of all n LP blocks and the partner's head to the prefixes.
        probability: of a block to be LP, where any mask may be drawn.
        schedule: a factor of all weights.

    Raises:
        ValueError: for a value that does not exist or does not fit.
    """

    name: str
    num_blocks: int
    weights: str | tuple[float, ...] = 'halving'
    num_sampled: int = 1
    include_last: bool = False
    probability: Schedule = HALF_TO_ONE
    schedule: Schedule = ALWAYS

    def __post_init__(self):
        if isinstance(self.weights, list):
            object.__setattr__(self, 'weights', tuple(self.weights))  # a plan is hashed where programs are compiled
        PLANS.get(self.name)  # raises ValueError for a plan that does not exist
        if self.name != 'none' and self.num_blocks < 2:
            raise ValueError(
                f'replacement plan {self.name!r} needs a network of at least two blocks: with one there is no mixed-'
                "precision model. Cut the network finer (replacement.cut='block') or use the plan 'none'."
            )
        if self.include_last and self.name not in WITH_LAST:
            raise ValueError(
                f'replacement.include_last adds to prefixes; the plan {self.name!r} has none. It must be one of '
                f'{", ".join(WITH_LAST)}.'
            )
        if any(len(model) != self.num_blocks for model in self.models):
            raise ValueError(f'replacement plan {self.name!r}: a model must say of each of {self.num_blocks} blocks '
                             f'whether it is LP; its models: {self.models}.')  # fmt: skip
        if self.draws_any_mask:
            if self.num_sampled < 1:
                raise ValueError(f'replacement.paths={self.num_sampled}: it must be at least 1.')
            if not all(0 <= end <= 1 for end in self.probability.ends):
                raise ValueError(f'replacement.probability: it goes from {self.probability.ends[0]} to '
                                 f'{self.probability.ends[1]}, and must stay between 0 and 1.')  # fmt: skip
        elif self.is_drawn and not 1 <= self.num_sampled <= len(self.models):
            raise ValueError(
                f'replacement.paths={self.num_sampled}: of {self.num_blocks} blocks 1 to {len(self.models)} models '
                'can be drawn.'
            )
        if min(self.schedule.ends) < 0:
            raise ValueError(f'replacement.weights_schedule: {min(self.schedule.ends)} is negative.')
        self._check_weights()

    def _check_weights(self):
        if isinstance(self.weights, str):
            if self.weights not in PATH_WEIGHTS:
                raise ValueError(
                    f'replacement.weights={self.weights!r}: they must be one of {", ".join(PATH_WEIGHTS)}, or a number '
                    'for each mixed-precision model.'
                )
            return
        count = self.num_sampled if self.draws_any_mask else len(self.models)
        if len(self.weights) != count or not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(
                f'replacement.weights={",".join(map(str, self.weights))}: the plan {self.name!r} needs {count} '
                'finite numbers, none of them negative.'
            )

    @property
    def models(self) -> tuple[Model, ...]:
        """The models that there may be, a mask over the blocks each; none where any mask may be drawn."""
        models = PLANS.get(self.name)(self.num_blocks)
        if not isinstance(models, list | tuple) or not all(isinstance(model, list | tuple) for model in models):
            raise ValueError(
                f'The plan {self.name!r} returned {models!r} for {self.num_blocks} blocks: it must return a tuple of '
                'models, each a tuple that says of every block whether it is LP.'
            )
        models = tuple(tuple(model) for model in models)
        return (*models, (True,) * self.num_blocks) if self.include_last else models

    @property
    def draws_any_mask(self) -> bool:
        """Whether every block of a model is drawn apart."""
        return self.is_drawn and not self.models

    @property
    def num_paths(self) -> int:
        """MP models per step."""
        return self.num_sampled if self.is_drawn else len(self.models)

    @property
    def is_drawn(self) -> bool:
        """Whether the mask is drawn at run time, rather than known when the step is traced."""
        return self.name in DRAWN

    @property
    def needs_partner_features(self) -> bool:
        """Whether an LP block may run on features that an FP block gave."""
        return self.draws_any_mask or any(lp and not all(m[:i]) for m in self.models for i, lp in enumerate(m))

    def draw(self, key: jax.Array | None, progress: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
        """Draws the MP models of one step.

        Args:
            key: random key, the same on every host; None for a plan that draws nothing.
            progress: fraction of training that is done.

        Returns:
            The mask, bool (paths, blocks), and the loss weights of the paths, float32 (paths,); those of sampled plans
            are scaled so that their expectation is that of all models together.

        Raises:
            ValueError: if the plan draws, and there is no key.
        """
        factor = self.schedule.at(progress)
        if not self.is_drawn:
            mask, weights = self._describe(jnp.arange(len(self.models)))
            return mask, weights * factor
        if key is None:
            raise ValueError(f'The plan {self.name!r} draws its models: give a random key.')
        if self.draws_any_mask:
            mask = jax.random.bernoulli(key, self.probability.at(progress), (self.num_sampled, self.num_blocks))
            return mask, self._bernoulli_weights(mask) * factor
        # Without replacement each of m models is drawn with probability k / m.
        chosen = jax.random.choice(key, len(self.models), (self.num_sampled,), replace=False)
        mask, weights = self._describe(chosen)
        return mask, weights * factor

    def outcomes(self) -> Iterator[tuple[float, jax.Array, jax.Array]]:
        """Yields every draw there can be, up to the order of paths: probability, mask and loss weights.

        At the end of training; not for a plan that draws any mask.
        """
        count = self.num_sampled if self.is_drawn else len(self.models)
        draws = list(itertools.combinations(range(len(self.models)), count))
        for chosen in draws:
            mask, weights = self._describe(jnp.array(chosen, jnp.int32))
            yield 1.0 / len(draws), mask, weights * self.schedule.at(1.0)

    def _describe(self, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mask and weights of the models with these numbers."""
        models = jnp.array(self.models, bool).reshape(len(self.models), self.num_blocks)
        scale = len(self.models) / self.num_sampled if self.is_drawn else 1.0
        return models[chosen], jnp.array(self._model_weights(), jnp.float32)[chosen] * scale

    def _model_weights(self) -> tuple[float, ...]:
        if self.weights == 'halving':
            return tuple(0.5 ** model.count(False) for model in self.models)
        if isinstance(self.weights, str):
            return (1.0 if self.weights == 'uniform' else 1.0 / len(self.models),) * len(self.models)
        return self.weights

    def _bernoulli_weights(self, mask: jax.Array) -> jax.Array:
        if self.weights == 'halving':
            return 0.5 ** jnp.sum(~mask, axis=1).astype(jnp.float32)
        if isinstance(self.weights, str):
            return jnp.full(self.num_sampled, 1.0 if self.weights == 'uniform' else 1.0 / self.num_sampled, jnp.float32)
        return jnp.array(self.weights, jnp.float32)
