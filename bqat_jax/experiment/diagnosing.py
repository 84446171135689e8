"""Diagnoses a network during or after training: reads batches, measures, writes files."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.analysis.diagnosis import DIRECTORY, make_diagnosis, write_diagnosis
from bqat_jax.analysis.measurement import make_oscillation_measurement
from bqat_jax.data.pipeline import Split
from bqat_jax.distributed.processes import is_first
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.phase import Phase
from bqat_jax.experiment.reading import plain_batches, training_batches
from bqat_jax.experiment.streams import Stream
from bqat_jax.replacement.network_layers import blocks_of_layers
from bqat_jax.training.optimizer import OptimizerSpec, Rates, make_optimizer
from bqat_jax.training.state import TrainState
from bqat_jax.training.step import make_train_step

# Steps of a schedule that stays at its first value.
ENDLESS = 10**9


def make_phase_diagnosis(experiment: Experiment, phase: Phase, split: Split) -> Callable[[TrainState], dict[str, Any]]:
    """Returns a function that diagnoses a training state; its programs are compiled once.

    With replicas the first one is diagnosed. Oscillations are tracked in extra steps at half the peak learning rate,
    the rate in the middle of a cosine decay: at the end of training the rate is zero and no weight would move.

    Args:
        experiment: the experiment.
        phase: its phase.
        split: the training split.

    Returns:
        `diagnose(state)`, which writes and returns the diagnosis; it does not change the state, of all replicas.
    """
    settings = experiment.diagnosis
    prepare = jax.jit(phase.spec.prepare, static_argnums=2)
    blocks = blocks_of_layers(experiment.network, experiment.shapes, experiment.layers)
    measure = make_diagnosis(phase.spec, blocks, settings)
    watch = _make_oscillation_watch(experiment, phase, split) if settings.oscillation_steps else None

    def diagnose(state):
        state = phase.replicas.first(state)
        raw = plain_batches(experiment, split, experiment.seeds[0], Stream.DIAGNOSIS, settings.batches)
        diagnosis = measure(state, phase.partner, [prepare(batch, split.arrays, None) for batch in raw])
        if watch is not None:
            diagnosis['oscillating'] = watch(state)
        if is_first():
            write_diagnosis(experiment.workdir / DIRECTORY, diagnosis)
        return diagnosis

    return diagnose


def _make_oscillation_watch(
    experiment: Experiment, phase: Phase, split: Split
) -> Callable[[TrainState], dict[str, float]]:
    settings, replicas = experiment.diagnosis, experiment.single
    optimizer, learning_rate = make_optimizer(_at_half_rates(phase.optimizer), ENDLESS)
    train_step = make_train_step(phase.spec, optimizer, learning_rate, replicas)

    def step(state, batch):
        return train_step(state, phase.partner, split.arrays, batch)[0]

    measure = make_oscillation_measurement(phase.spec, step)
    start = settings.batches  # after those that gradients are measured on

    def watch(state):
        # A copy, since the step donates its state. The optimizer's moving averages start from zero.
        copy = jax.tree.map(jnp.copy, state)
        copy = copy.replace(opt_state=optimizer.init(copy.params))
        stop = start + settings.oscillation_steps
        return measure(copy, training_batches(experiment, split, Stream.DIAGNOSIS, replicas, start, stop))

    return watch


def _at_half_rates(optimizer: OptimizerSpec) -> OptimizerSpec:
    """The optimizer at half its peak learning rates, without a warm-up."""
    own = optimizer.quantizers
    return dataclasses.replace(
        optimizer,
        learning_rate=optimizer.learning_rate / 2,
        warmup_steps=0,
        quantizers=None if own is None else Rates(own.learning_rate / 2, own.weight_decay),
    )
