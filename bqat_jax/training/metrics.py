"""The metrics of a training step that `metrics.jsonl` has in addition to the terms of the loss.

A metric is a scalar computed inside the jitted step; every entry of `step_metrics` is logged. The terms of the loss
come from `bqat_jax.replacement.objective`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.training.regularizers import oscillation_metrics
from bqat_jax.training.state import TrainState


class StepFacts(NamedTuple):
    """The inputs of the metrics.

    Attributes:
        before: the state before the step.
        after: the state after the step.
        gradients: gradients with respect to `before.params`, in its structure.
        learning_rate: the network's learning rate in this step.
        l2_params: the norm of `after.params`.
    """

    before: TrainState
    after: TrainState
    gradients: Any
    learning_rate: jax.Array
    l2_params: jax.Array


def l2_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm of a tree of real arrays, float32; 0 for an empty tree.

    `optax.tree.norm` needs twice as many operations, because it squares imaginary parts too.
    """
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def step_metrics(step: StepFacts) -> dict[str, jax.Array]:
    """Returns the metrics of a step, all scalars."""
    return {
        'first_bad_step': step.after.first_bad_step,
        'learning_rate': step.learning_rate,
        'l2_gradients': l2_norm(step.gradients),
        'l2_params': step.l2_params,
        'l2_updates': l2_norm(jax.tree.map(jnp.subtract, step.after.params, step.before.params)),
        **oscillation_metrics(step.after.trackers),
    }
