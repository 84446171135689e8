"""The state of training, one training step and one evaluation step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bqat_jax.data.augmentation import augment, normalize
from bqat_jax.data.pipeline import get_examples
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.networks.batch_norm import batch_norm_in_groups
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.training.microbatches import accumulate
from bqat_jax.training.optimizer import NETWORK, QUANTIZERS, LearningRate
from bqat_jax.training.regularizers import Regularizers, oscillation_metrics


@struct.dataclass
class TrainState:
    """Everything a training step changes.

    Attributes:
        step: int32, steps done.
        key: random key of the phase; step t uses `fold_in(key, t)`.
        params: {'network': the network's parameters, 'quantizers': the quantizers'}.
        batch_stats: the network's batch statistics.
        opt_state: the optimizer's.
        deltas: {layer path: {role: strength}} for quantizers whose estimator measures one; see `curvature`.
        trackers: {layer path: tracker} of weights that may be frozen; see `regularizers`.
        first_bad_step: int32, the first step whose loss was not finite; -1 for none. Kept on the device, so that the
            loop need not wait for every loss and can still name the step.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    deltas: Any
    trackers: Any
    first_bad_step: jax.Array


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network; see `bqat_jax.data.augmentation`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool
    color_jitter: float = 0.0


NO_REGULARIZERS = Regularizers()


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained: the static parts of a training step.

    Attributes:
        replacement: network, quantizers, plan and objective; no quantizers in the phase that trains the full-precision
            partner.
        preprocessing: of the images.
        steps: how many there are, for what follows a schedule.
        regularizers: what is done about oscillating weights.
        draw_seed: of what the plan draws.
        microbatches: parts that a batch is run in, one after another; see `accumulation`.
        batch_norm_groups: parts of what is run at once that batch norm normalises apart; see `batch_norm_in_groups`.
    """

    replacement: BlockReplacement
    preprocessing: Preprocessing
    steps: int
    regularizers: Regularizers = NO_REGULARIZERS
    draw_seed: int = 0
    microbatches: int = 1
    batch_norm_groups: int = 1

    def draw(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mask and weights of the MP models of step number `step`, counted from 0; see `Plan.draw`."""
        key = jax.random.fold_in(jax.random.key(self.draw_seed), step)
        return self.replacement.plan.draw(key, self.progress(step))

    def progress(self, step: jax.Array) -> jax.Array:
        """Returns the fraction of training that is done before step number `step`, counted from 0."""
        return step.astype(jnp.float32) / max(self.steps, 1)


def init_state(
    problem: Problem, key: jax.Array, params: Any, batch_stats: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step; params are {'network': ..., 'quantizers': ...}."""
    deltas: dict[str, dict[str, jax.Array]] = {}
    for path, role, quantizer in problem.replacement.quantization.quantizers():
        if quantizer.estimator.needs_delta:
            deltas.setdefault(path, {})[role] = jnp.float32(0)
    trackers = problem.regularizers.init_trackers(problem.replacement.quantization, params[QUANTIZERS], params[NETWORK])
    return TrainState(
        step=jnp.int32(0),
        key=key,
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        deltas=deltas,
        trackers=trackers,
        first_bad_step=jnp.int32(-1),
    )


def loss_and_metrics(
    problem: Problem,
    params: Any,
    batch_stats: Any,
    partner: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    progress: jax.Array,
    deltas: Any,
    draw: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
    """Returns the loss of block replacement with what the regularizers add to it.

    Args:
        problem: what is trained.
        params: {'network': ..., 'quantizers': ...}.
        batch_stats: the network's batch statistics.
        partner: the FP partner's variables; None if neither plan nor objective reads them.
        images: preprocessed images.
        labels: integers.
        key: of the quantizers' draws, and of dropout.
        progress: fraction of training that is done.
        deltas: of the state.
        draw: mask and weights of the MP models.

    Returns:
        The loss, and (new batch statistics, metrics).
    """
    with batch_norm_in_groups(problem.batch_norm_groups):
        loss, (new_stats, metrics) = problem.replacement.loss(
            params[NETWORK],
            params[QUANTIZERS],
            batch_stats,
            partner,
            images,
            labels,
            key,
            progress=progress,
            deltas=deltas,
            draw=draw,
        )
    if problem.regularizers.dampens:
        metrics['loss/dampening'] = problem.regularizers.loss(
            problem.replacement.quantization, params[QUANTIZERS], params[NETWORK], progress
        )
        loss = metrics['loss'] = loss + metrics['loss/dampening']
    return loss, (new_stats, metrics)


def prepare_batch(
    problem: Problem, state: TrainState, arrays: Any, batch: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the images as the network sees them in step `state.step`, their labels, and the key for the loss."""
    augment_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    images, labels = get_examples(batch, arrays)
    how = problem.preprocessing
    images = augment(augment_key, images, crop_padding=how.crop_padding, flip=how.flip, jitter=how.color_jitter)
    return normalize(images, how.mean, how.std), labels, loss_key


def train_step(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    learning_rate: LearningRate,
    gather: Callable[[Any], Any] = lambda tree: tree,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the step `step(state, partner, arrays, batch, draw) -> state, metrics`, a pure function to be jitted.

    Its arguments: the state; the partner's variables, frozen, or None; the split that lives on the device, or None; the
    batch, sharded over its first axis; mask and weights of the MP models, drawn by `problem.draw` if None.

    Args:
        problem: what is trained.
        optimizer: the update.
        learning_rate: of the network, as `make_optimizer` gives it.
        gather: brings a tree of parameters together where the devices have parts of them; see `Placement.gather`.
    """

    def step(
        state: TrainState, partner: Any, arrays: Any, batch: Any, draw: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        draw = problem.draw(state.step) if draw is None else draw
        images, labels, key = prepare_batch(problem, state, arrays, batch)
        progress = problem.progress(state.step)

        def loss_function(params, batch_stats, images, labels, key):
            return loss_and_metrics(
                problem,
                gather(params),
                batch_stats,
                gather(partner),
                images,
                labels,
                key,
                progress,
                state.deltas,
                draw,
            )

        gradient = accumulate(jax.value_and_grad(loss_function, has_aux=True), problem.microbatches)
        (loss, (batch_stats, metrics)), gradients = gradient(state.params, state.batch_stats, images, labels, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        params[QUANTIZERS] = problem.replacement.quantization.constrain(params[QUANTIZERS], state.params[QUANTIZERS])
        trackers, params[NETWORK] = problem.regularizers.freeze(
            problem.replacement.quantization, state.trackers, params[QUANTIZERS], params[NETWORK], progress
        )
        is_bad = (state.first_bad_step < 0) & ~jnp.isfinite(loss)
        first_bad_step = jnp.where(is_bad, state.step, state.first_bad_step)
        metrics |= {
            'first_bad_step': first_bad_step,
            'learning_rate': learning_rate(state.opt_state, state.step),
            'l2_gradients': optax.tree.norm(gradients),
            'l2_params': optax.tree.norm(params),
            'l2_updates': optax.tree.norm(jax.tree.map(jnp.subtract, params, state.params)),
            **oscillation_metrics(trackers),
        }
        new_state = TrainState(
            step=state.step + 1,
            key=state.key,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            deltas=state.deltas,
            trackers=trackers,
            first_bad_step=first_bad_step,
        )
        return new_state, metrics

    return step


def make_train_step(
    problem: Problem, optimizer: optax.GradientTransformation, learning_rate: LearningRate, replicas: Replicas
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted `step(state, partner, arrays, batch) -> state, metrics` of all replicas.

    It takes the state over.
    """
    gather = replicas.placement.gather
    step = replicas.over(train_step(problem, optimizer, learning_rate, gather), (0, None, None, 0, None))

    def steps(state, partner, arrays, batch):
        # All replicas are at the same step, and what the plan draws is the same for them.
        return step(state, partner, arrays, batch, problem.draw(state.step.reshape(-1)[0]))

    return replicas.jit(steps, (0, None, None, 0), donate_argnums=(0,))


def evaluation_step(
    problem: Problem, gather: Callable[[Any], Any] = lambda tree: tree
) -> Callable[..., dict[str, jax.Array]]:
    """Returns `step(params, batch_stats, arrays, batch) -> {'correct', 'examples'}`, counts of one batch.

    Examples whose 'mask' in the batch is false are not counted; `gather` is as in `train_step`.
    """

    def step(params: Any, batch_stats: Any, arrays: Any, batch: Any) -> dict[str, jax.Array]:
        images, labels = get_examples(batch, arrays)
        images = normalize(images, problem.preprocessing.mean, problem.preprocessing.std)
        params = gather(params)
        logits = problem.replacement.logits(params[NETWORK], params[QUANTIZERS], batch_stats, images)
        correct = (jnp.argmax(logits, axis=-1) == labels) & batch['mask']
        return {'correct': jnp.sum(correct), 'examples': jnp.sum(batch['mask'])}

    return step


def make_evaluation_step(problem: Problem, replicas: Replicas) -> Callable[..., dict[str, jax.Array]]:
    """Returns the jitted `evaluation_step` of all replicas, which see the same batch."""
    axes = (0, 0, None, None)
    return replicas.jit(replicas.over(evaluation_step(problem, replicas.placement.gather), axes), axes)
