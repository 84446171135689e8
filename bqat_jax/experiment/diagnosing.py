"""Diagnoses a network in the middle of a run: reads batches, measures, writes files."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.analysis.diagnosis import DIRECTORY, diagnose, write_diagnosis
from bqat_jax.analysis.measurement import measure_oscillations
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

# Steps of a schedule that is meant to stay where it begins.
ENDLESS = 10**9


def diagnose_phase(experiment: Experiment, phase: Phase, split: Split, state: TrainState) -> dict[str, Any]:
    """Measures a network at one moment of its training; writes and returns the diagnosis.

    With replicas the first one is diagnosed. Oscillations are watched during steps that are made for the diagnosis
    alone, at half the peak learning rate: the rate in the middle of a cosine decay. At the end of training, where it is
    zero, nothing would move.

    Args:
        experiment: what is run.
        phase: of it.
        split: the training split.
        state: of all replicas; it stays as it is.
    """
    settings, state = experiment.diagnosis, phase.replicas.first(state)
    seed, prepare = experiment.seeds[0], jax.jit(phase.spec.prepare, static_argnums=2)
    raw = plain_batches(experiment, split, seed, Stream.DIAGNOSIS, settings.batches)
    batches = [prepare(batch, split.arrays, None) for batch in raw]
    blocks = blocks_of_layers(experiment.network, experiment.shapes, experiment.layers)
    diagnosis = diagnose(phase.spec, state, phase.partner, blocks, batches, settings)
    if settings.oscillation_steps:
        diagnosis['oscillating'] = _watch_oscillations(experiment, phase, split, state)
    if is_first():
        write_diagnosis(experiment.workdir / DIRECTORY, diagnosis)
    return diagnosis


def _watch_oscillations(experiment: Experiment, phase: Phase, split: Split, state: TrainState) -> dict[str, float]:
    settings, replicas = experiment.diagnosis, experiment.single
    optimizer, learning_rate = make_optimizer(_at_half_rates(phase.optimizer), ENDLESS)
    train_step = make_train_step(phase.spec, optimizer, learning_rate, replicas)
    # A copy: the step donates its state. The optimizer's moving averages begin anew.
    copy = jax.tree.map(jnp.copy, state)
    copy = copy.replace(opt_state=optimizer.init(copy.params))
    start = settings.batches  # behind those that gradients are measured on
    batches = training_batches(experiment, split, Stream.DIAGNOSIS, replicas, start, start + settings.oscillation_steps)

    def step(state, batch):
        return train_step(state, phase.partner, split.arrays, batch)[0]

    return measure_oscillations(phase.spec, step, copy, batches)


def _at_half_rates(optimizer: OptimizerSpec) -> OptimizerSpec:
    """The optimizer at half its peak learning rates, without a warm-up."""
    own = optimizer.quantizers
    return dataclasses.replace(
        optimizer,
        learning_rate=optimizer.learning_rate / 2,
        warmup_steps=0,
        quantizers=None if own is None else Rates(own.learning_rate / 2, own.weight_decay),
    )
