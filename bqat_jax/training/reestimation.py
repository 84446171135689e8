"""Re-estimation of batch-norm statistics after training.

With oscillating weights, the running statistics are inaccurate (Nagel et al., ICML 2022, arXiv 2203.11086).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BATCH_STATS
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.quantizers.rounding import EVALUATION
from bqat_jax.training.loss import task_loss_alone, total_loss
from bqat_jax.training.spec import TrainSpec
from bqat_jax.training.state import TrainState
from bqat_jax.training.step import prepare_batch
from bqat_jax.transform import mean_of_trees


def reestimate_batch_stats(
    spec: TrainSpec, state: TrainState, arrays: Any, batches: Iterable[Any], replicas: Replicas
) -> Any:
    """Returns the mean of the batch statistics over training batches, which replaces the stored statistics.

    Batch norm uses the batch, in as many groups as in training; quantizers round as in evaluation.

    Args:
        spec: the static parts of training.
        state: the training state; it is not changed.
        arrays: the split that is stored on the device, or None.
        batches: batches of the training split on the devices, augmented as in training; at least one.
        replicas: the replicas.
    """
    task = task_loss_alone(spec)

    def statistics(state, arrays, batch, number):
        prepared, _ = prepare_batch(spec, dataclasses.replace(state, step=state.step + number), arrays, batch)

        def updated(stored):
            # The update is linear in stored and batch statistics: stored values of 0 and 1 determine both shares, for
            # any momentum.
            stats = jax.tree.map(lambda x: jnp.full_like(x, stored), state.collections[BATCH_STATS])
            variables = state.variables._replace(collections={**state.collections, BATCH_STATS: stats})
            _, (collections, _) = total_loss(task, variables, None, prepared, EVALUATION)
            return collections[BATCH_STATS]

        return jax.tree.map(lambda zero, one: zero / (1 - (one - zero)), updated(0.0), updated(1.0))

    axes = (0, None, 0, None)
    run = replicas.jit(replicas.over(statistics, axes), axes)
    # Block after each batch: with a long queue of programs, XLA's CPU devices can deadlock.
    estimates = [
        jax.block_until_ready(run(state, arrays, batch, jnp.int32(number))) for number, batch in enumerate(batches)
    ]
    return mean_of_trees(estimates)
