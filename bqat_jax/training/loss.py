"""The loss of training, diagnosis, the measurement of strengths and re-estimation."""

import dataclasses
from typing import Any

import jax

from bqat_jax.networks.batch_norm import batch_norm_in_groups
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.block_replacement import Batch
from bqat_jax.replacement.objective import task_alone
from bqat_jax.replacement.paths import Variables
from bqat_jax.replacement.plans import Plan
from bqat_jax.training.spec import NO_REGULARIZERS, TrainSpec


def total_loss(
    spec: TrainSpec,
    variables: Variables,
    partner: Any,
    batch: Batch,
    context: Context,
    draw: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
    """Returns the loss of block replacement plus the regularizers' losses.

    Args:
        spec: the static parts of training.
        variables: variables of the network and its quantizers.
        partner: the FP partner's variables; None if neither plan nor objective reads them.
        batch: prepared inputs and targets.
        context: progress, random key and strengths; see `BlockReplacement.loss`.
        draw: mask and weights of the MP models; None draws them from the context's key.

    Returns:
        The loss, a scalar, and (updated collections, metrics).
    """
    with batch_norm_in_groups(spec.batch_norm_groups):
        loss, (collections, metrics) = spec.replacement.loss(variables, partner, batch, context, draw)
    if spec.regularizers.dampens:
        dampening = spec.regularizers.loss(spec.replacement.quantization, variables, context.progress)
        metrics['loss/dampening'] = dampening
        loss = metrics['loss'] = loss + dampening
    return loss, (collections, metrics)


def task_loss_alone(spec: TrainSpec) -> TrainSpec:
    """Returns `spec` with the task's loss of the LP network, such as the cross entropy, as its only loss.

    It reads neither the partner nor a plan's draw.
    """
    plan = Plan('none', spec.replacement.plan.num_blocks)
    replacement = dataclasses.replace(spec.replacement, plan=plan, objective=task_alone(spec.replacement.task))
    return dataclasses.replace(spec, replacement=replacement, regularizers=NO_REGULARIZERS)
