"""Replacement plans: which blocks of each mixed-precision (MP) model of a training step are low precision.

A plan's mask m[k, i] is true where block i of MP model k is low precision (LP), and false where it is the
full-precision (FP) partner's. The head of every MP model is the partner's (ours).

    none            no MP model: plain quantization-aware training, or distillation
    prefix          all n-1 models whose first blocks are LP, every step (arXiv 2411.01547, by the paper's team)
    single          all n models with one LP block, every step: the other reading of "replacement on the FP model"
    suffix          all n-1 models whose last blocks are LP, every step: an ablation (ours)
    prefix_sampled  k models of `prefix`, drawn per step, weighted so that the expected loss equals that of `prefix`
                    (ours)
    single_sampled  k models of `single`, drawn per step, weighted so that the expected loss equals that of `single`
                    (ours)
    bernoulli       k models; each block is LP with a probability that may change over training, as in the module
                    replacing of BERT-of-Theseus (arXiv 2002.02925)

MP models from block-by-block replacement on the FP model, run next to the LP network, are arXiv 2412.15846's.
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
DRAWN: set[str] = set()  # names of plans that draw
PATH_WEIGHTS = ('halving', 'uniform', 'mean')
# Plans to which the model of all LP blocks and the partner's head can be added.
WITH_LAST = ('prefix', 'prefix_sampled')
# BERT-of-Theseus' schedule.
HALF_TO_ONE = Linear(start=0.5, end=1.0)


def register_plan(name: str, *, is_drawn: bool = False) -> Callable[[Callable], Callable]:
    """Returns a decorator that registers a replacement plan as `name`.

    The decorated function takes the number of blocks and returns the plan's MP models, each a tuple with one bool per
    block, true where the block is LP.

    Args:
        name: value for `config.replacement.plan`.
        is_drawn: whether each step draws some of the models instead of running all. A drawn plan without models draws
            every block separately, LP with `Plan.probability`.

    Raises:
        ValueError: if another module registered the name.
    """

    def decorate(models: Callable[[int], Sequence[Model]]) -> Callable[[int], Sequence[Model]]:
        PLANS.register(name)(models)
        (DRAWN.add if is_drawn else DRAWN.discard)(name)
        return models

    return decorate


@register_plan('none')
def none(num_blocks: int) -> Sequence[Model]:
    """There are no models."""
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
    """There are no models: any mask may be drawn."""
    del num_blocks
    return ()


def parse_path_weights(text: str) -> str | tuple[float, ...]:
    """Returns the weights in a config's notation: 'halving', 'uniform', 'mean', or comma-separated numbers.

    Raises:
        ValueError: for any other text.
    """
    if text in PATH_WEIGHTS:
        return text
    try:
        return tuple(float(part) for part in text.split(','))
    except ValueError as error:
        raise ValueError(
            f'replacement.weights={text!r}: must be one of {", ".join(PATH_WEIGHTS)}, or a number for each '
            "mixed-precision model, such as '0.25,0.5'."
        ) from error


@dataclasses.dataclass(frozen=True)
class Plan:
    """A replacement plan for a network of n blocks.

    Attributes:
        name: one of `PLANS`.
        num_blocks: n.
        weights: loss weights of the models: 'halving', 1/2^f for a model with f FP blocks, which for prefixes is
            Block-KD's 1/2^(n-i) (arXiv 2411.01547); 'uniform', 1; 'mean', 1 / number of models (both ours); or a number
            for each model.
        num_sampled: models per step, for plans that draw.
        include_last: adds the model of all n LP blocks and the partner's head to the prefixes.
        probability: probability that a block is LP, for plans that draw any mask.
        schedule: a factor of all weights.

    Raises:
        ValueError: for an unknown name, or a value that does not fit the plan.
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
            object.__setattr__(self, 'weights', tuple(self.weights))  # A plan must be hashable, as a static argument.
        PLANS.get(self.name)  # Raises ValueError for an unknown plan.
        if self.name != 'none' and self.num_blocks < 2:
            raise ValueError(
                f'replacement plan {self.name!r} needs a network of at least two blocks: with one block there is no '
                "mixed-precision model. Cut the network finer (replacement.cut='block') or use the plan 'none'."
            )
        if self.include_last and self.name not in WITH_LAST:
            raise ValueError(
                f'replacement.include_last adds a model to prefixes, and the plan {self.name!r} has none. Use one of '
                f'{", ".join(WITH_LAST)}.'
            )
        if any(len(model) != self.num_blocks for model in self.models):
            raise ValueError(f'replacement plan {self.name!r}: a model must have one bool for each of '
                             f'{self.num_blocks} blocks; its models: {self.models}.')  # fmt: skip
        if self.draws_any_mask:
            if self.num_sampled < 1:
                raise ValueError(f'replacement.paths={self.num_sampled}: must be at least 1.')
            if not all(0 <= end <= 1 for end in self.probability.ends):
                raise ValueError(f'replacement.probability: it goes from {self.probability.ends[0]} to '
                                 f'{self.probability.ends[1]}, and must stay between 0 and 1.')  # fmt: skip
        elif self.is_drawn and not 1 <= self.num_sampled <= len(self.models):
            raise ValueError(
                f'replacement.paths={self.num_sampled}: must be from 1 to {len(self.models)}, the number of models of '
                f'{self.num_blocks} blocks.'
            )
        if min(self.schedule.ends) < 0:
            raise ValueError(f'replacement.weights_schedule: {min(self.schedule.ends)} must not be negative.')
        self._check_weights()

    def _check_weights(self):
        if isinstance(self.weights, str):
            if self.weights not in PATH_WEIGHTS:
                raise ValueError(
                    f'replacement.weights={self.weights!r}: must be one of {", ".join(PATH_WEIGHTS)}, or a number for '
                    'each mixed-precision model.'
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
        """The possible models, each a mask over the blocks; empty if any mask may be drawn."""
        models = PLANS.get(self.name)(self.num_blocks)
        if not isinstance(models, list | tuple) or not all(isinstance(model, list | tuple) for model in models):
            raise ValueError(
                f'The plan {self.name!r} returned {models!r} for {self.num_blocks} blocks: it must return a tuple of '
                'models, each a tuple with one bool per block, true where the block is LP.'
            )
        models = tuple(tuple(model) for model in models)
        return (*models, (True,) * self.num_blocks) if self.include_last else models

    @property
    def draws_any_mask(self) -> bool:
        """Whether every block of a model is drawn separately."""
        return self.is_drawn and not self.models

    @property
    def num_paths(self) -> int:
        """Number of MP models per step."""
        return self.num_sampled if self.is_drawn else len(self.models)

    @property
    def is_drawn(self) -> bool:
        """Whether the mask is drawn at run time; otherwise it is known when the step is traced."""
        return self.name in DRAWN

    @property
    def needs_partner_features(self) -> bool:
        """Whether an LP block may run on the output of an FP block."""
        return self.draws_any_mask or any(lp and not all(m[:i]) for m in self.models for i, lp in enumerate(m))

    def draw(self, key: jax.Array | None, progress: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
        """Draws the MP models of one step.

        Args:
            key: random key, equal on every host; None for a plan that draws nothing.
            progress: completed fraction of training.

        Returns:
            The mask, bool (paths, blocks), and the loss weights of the paths, float32 (paths,). Weights of sampled
            plans are scaled so that the expected loss is that of all models.

        Raises:
            ValueError: if the plan draws and `key` is None.
        """
        factor = self.schedule.at(progress)
        if not self.is_drawn:
            mask, weights = self._describe(jnp.arange(len(self.models)))
            return mask, weights * factor
        if key is None:
            raise ValueError(f'The plan {self.name!r} draws its models. Give a random key.')
        if self.draws_any_mask:
            mask = jax.random.bernoulli(key, self.probability.at(progress), (self.num_sampled, self.num_blocks))
            return mask, self._bernoulli_weights(mask) * factor
        # Drawn without replacement, each of m models has probability k / m.
        chosen = jax.random.choice(key, len(self.models), (self.num_sampled,), replace=False)
        mask, weights = self._describe(chosen)
        return mask, weights * factor

    def outcomes(self) -> Iterator[tuple[float, jax.Array, jax.Array]]:
        """Yields (probability, mask, loss weights) of every possible draw at the end of training, ignoring path order.

        Plans that draw any mask are not supported.
        """
        count = self.num_sampled if self.is_drawn else len(self.models)
        draws = list(itertools.combinations(range(len(self.models)), count))
        for chosen in draws:
            mask, weights = self._describe(jnp.array(chosen, jnp.int32))
            yield 1.0 / len(draws), mask, weights * self.schedule.at(1.0)

    def _describe(self, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mask and weights of the models with the indices `chosen`."""
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
