"""The metrics of a training step: what `metrics.jsonl` has beside the terms of the loss.

A metric is a scalar that is computed inside the jitted step; one more entry in `step_metrics` is logged by itself. The
terms of the loss come from `bqat_jax.replacement.objective`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.training.regularizers import oscillation_metrics
from bqat_jax.training.state import TrainState


class StepFacts(NamedTuple):
    """What metrics are made from.

    Attributes:
        before: the state before the step.
        after: the state after it.
        gradients: with respect to `before.params`, in the same structure.
        learning_rate: of the network in this step.
        l2_params: the norm of `after.params`.
    """

    before: TrainState
    after: TrainState
    gradients: Any
    learning_rate: jax.Array
    l2_params: jax.Array


def l2_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm of all numbers of a tree of real arrays, float32; 0 for an empty one.

    `optax.tree.norm` gives the same, in twice as many operations: it squares an imaginary part too.
    """
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def step_metrics(step: StepFacts) -> dict[str, jax.Array]:
    """Returns the metrics of a step, each a scalar."""
    return {
        'first_bad_step': step.after.first_bad_step,
        'learning_rate': step.learning_rate,
        'l2_gradients': l2_norm(step.gradients),
        'l2_params': step.l2_params,
        'l2_updates': l2_norm(jax.tree.map(jnp.subtract, step.after.params, step.before.params)),
        **oscillation_metrics(step.after.trackers),
    }
