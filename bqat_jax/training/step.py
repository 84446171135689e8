"""The training step and the evaluation step, as pure functions and jitted over replicas."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bqat_jax.distributed.replicas import Replicas
from bqat_jax.distributed.sharding import replicated
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.block_replacement import Batch
from bqat_jax.training.loss import total_loss
from bqat_jax.training.metrics import StepFacts, l2_norm, step_metrics
from bqat_jax.training.microbatches import accumulate
from bqat_jax.training.optimizer import LearningRate
from bqat_jax.training.spec import NETWORK, QUANTIZERS, TrainSpec
from bqat_jax.training.state import TrainState, floats_of, variables_of


def prepare_batch(spec: TrainSpec, state: TrainState, arrays: Any, batch: Any) -> tuple[Batch, jax.Array]:
    """Returns the prepared batch of step `state.step`, and the random key for the loss."""
    prepare_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return spec.prepare(batch, arrays, prepare_key), loss_key


def train_step(
    spec: TrainSpec,
    optimizer: optax.GradientTransformation,
    learning_rate: LearningRate,
    gather: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the step `step(state, partner, arrays, batch, draw) -> state, metrics`, a pure function to be jitted.

    Its arguments are the state; the frozen partner's variables, or None; the split that is stored on the device, or
    None; the batch, sharded over its first axis; and mask and weights of the MP models, drawn by `spec.draw` if None.

    Args:
        spec: the static parts of training.
        optimizer: the optimizer.
        learning_rate: the network's learning rate, from `make_optimizer`.
        gather: gathers a tree of sharded parameters; see `Placement.gather`.
    """

    def step(
        state: TrainState, partner: Any, arrays: Any, batch: Any, draw: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        draw = spec.draw(state.step) if draw is None else draw
        prepared, key = prepare_batch(spec, state, arrays, batch)
        progress = spec.progress(state.step)

        def loss_function(params, collections, batch, key):
            variables = variables_of(gather(params), collections)
            context = Context(progress, key, state.strengths, state.trackers or None)
            return total_loss(spec, variables, gather(partner), batch, context, draw)

        gradient = accumulate(jax.value_and_grad(loss_function, has_aux=True), spec.microbatches)
        (loss, (collections, metrics)), gradients = gradient(state.params, state.collections, prepared, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        quantization = spec.replacement.quantization
        params[QUANTIZERS] = quantization.constrain(params[QUANTIZERS], state.params[QUANTIZERS])
        trackers, params[NETWORK] = spec.regularizers.freeze(
            quantization, state.trackers, variables_of(params, collections), progress
        )
        # Norms are cheap checks of finiteness, and the parameters' norm is a metric. An overflow is bad too.
        l2_params = l2_norm(params)
        is_sound = jnp.all(jnp.isfinite(jnp.stack([loss, l2_params, l2_norm(floats_of(collections))])))
        is_bad = (state.first_bad_step < 0) & ~is_sound
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            collections=collections,
            opt_state=opt_state,
            trackers=trackers,
            first_bad_step=jnp.where(is_bad, state.step, state.first_bad_step),
        )
        facts = StepFacts(state, new_state, gradients, learning_rate(state.opt_state, state.step), l2_params)
        return new_state, metrics | step_metrics(facts)

    return step


def make_train_step(
    spec: TrainSpec, optimizer: optax.GradientTransformation, learning_rate: LearningRate, replicas: Replicas
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted `step(state, partner, arrays, batch) -> state, metrics` of all replicas; donates `state`."""
    step = train_step(spec, optimizer, learning_rate, replicas.placement.gather)
    step_of_all = replicas.over(step, (0, None, None, 0, None))

    def steps(state, partner, arrays, batch):
        # All replicas are at one step and share the plan's draw.
        return step_of_all(state, partner, arrays, batch, spec.draw(state.step.reshape(-1)[0]))

    return replicas.jit(steps, (0, None, None, 0), donate_argnums=(0,))


def evaluation_step(
    spec: TrainSpec, gather: Callable[[Any], Any] = lambda tree: tree
) -> Callable[..., dict[str, jax.Array]]:
    """Returns `step(params, collections, arrays, batch) -> counts`: sums over a batch, to be added over a split.

    The counts are the task's, plus 'examples', the number of examples, and 'not_finite', the number of examples with a
    NaN or infinite output. Examples whose 'mask' in the batch is false are ignored. `gather` is that of `train_step`.
    """
    task = spec.replacement.task

    def step(params: Any, collections: Any, arrays: Any, batch: Any) -> dict[str, jax.Array]:
        inputs, targets = spec.prepare(batch, arrays, None)
        outputs = spec.replacement.logits(variables_of(gather(params), collections), inputs)
        task.check(outputs, targets)
        mask, is_finite = batch['mask'], task.is_finite(outputs, targets)
        counts = task.counts(outputs, targets, mask)
        return {**counts, 'examples': jnp.sum(mask), 'not_finite': jnp.sum(~is_finite & mask)}

    return step


def make_evaluation_step(spec: TrainSpec, replicas: Replicas) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted `evaluation_step` of all replicas, which share the batch."""
    if replicas.count == 1:  # Every process reads the counts, so they are replicated.
        step = evaluation_step(spec, replicas.placement.gather)
        return jax.jit(step, out_shardings=replicated(replicas.mesh))
    axes = (0, 0, None, None)
    return replicas.jit(replicas.over(evaluation_step(spec, replicas.placement.gather), axes), axes)
