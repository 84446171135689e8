"""`TrainSpec`: the static parts of a training step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.replacement.block_replacement import Batch, BlockReplacement
from bqat_jax.training.regularizers import Regularizers

# The two groups of trainable parameters, the keys of `TrainState.params`.
NETWORK, QUANTIZERS = 'network', 'quantizers'

# `prepare(batch, arrays, key)` makes a `Batch` from a loaded batch; a key of None means evaluation.
Prepare = Callable[[Any, Any, jax.Array | None], Batch]
NO_REGULARIZERS = Regularizers()


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """The static parts of a training step.

    Attributes:
        replacement: network, quantizers, plan and objective; without quantizers in the phase that trains the
            full-precision partner.
        prepare: `prepare(batch, arrays, key)` makes a `Batch` from a loaded batch and the data on the device; with a
            key it augments, with None it prepares for evaluation.
        steps: number of training steps, for schedules.
        regularizers: dampening and freezing of oscillating weights.
        draw_seed: seed of the plan's draws.
        microbatches: number of sequential parts of a batch; see `microbatches`.
        batch_norm_groups: number of groups that batch norm normalises separately; see `batch_norm_in_groups`.
    """

    replacement: BlockReplacement
    prepare: Prepare
    steps: int
    regularizers: Regularizers = NO_REGULARIZERS
    draw_seed: int = 0
    microbatches: int = 1
    batch_norm_groups: int = 1

    def draw(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mask and weights of the MP models of step `step` (from 0); see `Plan.draw`."""
        key = jax.random.fold_in(jax.random.key(self.draw_seed), step)
        return self.replacement.plan.draw(key, self.progress(step))

    def progress(self, step: jax.Array) -> jax.Array:
        """Returns the fraction of training that is completed before step `step` (from 0)."""
        return step.astype(jnp.float32) / max(self.steps, 1)
