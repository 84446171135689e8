"""One phase of a run: from its newest checkpoint, or from the beginning, to its end."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.analysis.diagnosis import diagnose
from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.processes import write_once
from bqat_jax.distributed.replicas import Replicas, values_of
from bqat_jax.distributed.sharding import path_of
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Checkpoints, Restored
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.experiment import Setting
from bqat_jax.experiment.metrics import NoRecorder, Recorder, open_recorder
from bqat_jax.experiment.profiling import Profile, make_profile
from bqat_jax.training.evaluation import evaluate
from bqat_jax.training.optimizer import NETWORK, QUANTIZERS, make_optimizer
from bqat_jax.training.step import (
    Problem,
    TrainState,
    init_state,
    make_evaluation_step,
    make_train_step,
)
from bqat_jax.training.strengths import make_measurement


@dataclasses.dataclass(frozen=True)
class Phase:
    """What is done in one phase of a run.

    Attributes:
        name: 'pretrain' or 'train'.
        purpose: number of its randomness, for `Setting.key` and `Setting.data_seed`.
        problem: what is trained.
        partner: the frozen partner's variables, or None.
        steps: how many.
        optimizer: its config.
        directory: of its checkpoints.
        replicas: how many run side by side.
    """

    name: str
    purpose: int
    problem: Problem
    partner: Any
    steps: int
    optimizer: Config
    directory: Path
    replicas: Replicas

    def batches(self, setting: Setting, start: int, stop: int) -> Iterator[Any]:
        """Yields the batches number `start` to `stop - 1`, on the devices."""
        readings = [
            setting.train_split.training_batches(
                setting.data_seed(self.purpose, replica), setting.config.train.batch_size, start, stop
            )
            for replica in range(self.replicas.count)
        ]
        return self.replicas.batches(readings)


def run_phase(
    setting: Setting,
    phase: Phase,
    init: Callable[[int], tuple[Any, Any]],
    quantizer_shapes: Any,
    stop: StopRequest,
) -> Restored:
    """Trains from the newest checkpoint of the phase, or from the beginning, to its end.

    Args:
        setting: of the run.
        phase: what to do.
        init: gives params {'network': ..., 'quantizers': ...} and batch statistics for a replica to begin with.
        quantizer_shapes: shapes and dtypes of the quantizers' parameters.
        stop: asked after every step.

    Returns:
        The checkpoint that counts: the best on the validation split, or the last if there is none. Its facts hold
        'seconds', the time that training took up to the end of the phase.

    Raises:
        UserError: if the loss is not finite, or a checkpoint cannot be written.
        Stopped: after a request to stop, when a checkpoint is saved.
    """
    target = state_target(setting, phase, quantizer_shapes)
    _tell_placement(setting, phase, target)
    with open_checkpoints(setting, phase.directory) as checkpoints:
        restored = checkpoints.restore_latest(target)
        if restored is None:
            optimizer, _ = _make_optimizer(setting, phase)

            def make(params, batch_stats, key):
                # Copies: the step takes its state over, and the partner may keep its arrays.
                params, batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))
                return init_state(phase.problem, key, params, batch_stats, optimizer)

            replicas, axes = phase.replicas, (0, 0, 0)
            arguments = [(*init(number), setting.key(phase.purpose, number)) for number in range(replicas.count)]
            state = replicas.jit(replicas.over(make, axes), axes)(*replicas.stack(arguments))
            start, seconds = 0, 0.0
        else:
            state, start, seconds = restored.state, restored.facts['next_batch'], restored.facts['seconds']
            setting.console.print(f'Phase {phase.name} goes on after step {start} of {phase.steps}.')
        if restored is None or start < phase.steps:
            with open_recorder(setting.workdir, phase.name, start, phase.steps, setting.console) as recorder:
                run = _Run(setting, phase, checkpoints, recorder, stop, time.monotonic() - seconds)
                seconds = run.steps(state, start, is_new=restored is None)
        counts = checkpoints.restore_best(target)
        assert counts is not None  # the end of the phase was saved
        return counts._replace(facts={**counts.facts, 'seconds': seconds})


def open_checkpoints(setting: Setting, directory: Path, *, read_only: bool = False) -> Checkpoints:
    """Opens the checkpoints of a phase as the config says they are kept."""
    has_scores = len(setting.images.validation) > 0
    return Checkpoints(directory, keep=setting.config.checkpoint.keep, has_scores=has_scores, read_only=read_only)


def state_target(setting: Setting, phase: Phase, quantizer_shapes: Any) -> Any:
    """Returns the shapes, dtypes and shardings of a phase's state."""
    optimizer, _ = _make_optimizer(setting, phase)
    variables = setting.abstract_variables
    params = {NETWORK: variables['params'], QUANTIZERS: quantizer_shapes}
    shapes = jax.eval_shape(
        lambda params, stats: init_state(phase.problem, jax.random.key(0), params, stats, optimizer),
        params,
        variables['batch_stats'],
    )
    return phase.replicas.stacked_shapes(shapes)


def _tell_placement(setting: Setting, phase: Phase, target: Any) -> None:
    """Says which arrays are split over devices, and by which rule, in `sharding_<phase>.json`."""
    placement = phase.replicas.placement
    if not placement.splits:
        return
    split = placement.describe(target)
    write_once(setting.workdir / f'sharding_{phase.name}.json', split)
    leaves = jax.tree.leaves(target)
    whole = sum(x.dtype.itemsize * x.size for x in leaves)
    own = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    setting.console.print(
        f'Phase {phase.name}: {len(split)} of {len(leaves)} arrays are split (mesh.fsdp={setting.config.mesh.fsdp}); '
        f'of {whole / 2**20:.1f} MiB each device keeps {own / 2**20:.1f}.'
    )
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(target)]
    for rule in placement.rules:
        if not any(rule.matches(path) for path in paths):
            setting.console.print(f'No array of this phase is matched by the rule {rule.path!r} of mesh.rules.')


def _make_optimizer(setting: Setting, phase: Phase):
    return make_optimizer(phase.optimizer, phase.steps, setting.steps(phase.optimizer, 'warmup_'))


class _Run:
    """The steps of a phase in this process: what `run_phase` would otherwise pass from hand to hand."""

    def __init__(
        self,
        setting: Setting,
        phase: Phase,
        checkpoints: Checkpoints,
        recorder: Recorder | NoRecorder,
        stop: StopRequest,
        began: float,
    ):
        self._setting, self._phase, self._checkpoints = setting, phase, checkpoints
        self._recorder, self._stop, self._began = recorder, stop, began
        self._seconds = 0.0  # up to the last checkpoint
        self._evaluation_step = make_evaluation_step(phase.problem, phase.replicas)
        self._speed = _Speedometer(setting.config.train.batch_size * phase.replicas.count)
        self._measure: Callable[..., Any] | None = None  # compiled when first needed

    def steps(self, state: TrainState, start: int, *, is_new: bool) -> float:
        """Runs the steps after `start`; returns the seconds of the phase, those of earlier processes included.

        The loop never waits for the step it has just begun: metrics are fetched when the next one is under way.
        """
        setting, phase = self._setting, self._phase
        optimizer, learning_rate = _make_optimizer(setting, phase)
        step = make_train_step(phase.problem, optimizer, learning_rate, phase.replicas)
        if is_new:
            self._save(state, start)
        with make_profile(setting.config, setting.workdir, phase.name) as profile:
            self._loop(state, start, step, profile)
        self._checkpoints.wait()
        return self._seconds

    def _loop(self, state: TrainState, start: int, step: Callable[..., Any], profile: Profile) -> None:
        setting, phase, stop = self._setting, self._phase, self._stop
        save_every = max(1, setting.steps(setting.config.checkpoint, 'every_'))
        measure_every = self._measure_every()
        log_every = setting.config.train.log_every_steps
        has_quantizers = bool(phase.problem.replacement.quantization.layers)
        diagnose_every = (setting.config.diagnosis.every_steps or 0) if has_quantizers else 0
        due: tuple[int, Any] | None = None  # metrics to record
        for done, batch in enumerate(phase.batches(setting, start, phase.steps), start + 1):
            if measure_every and done > 1 and (done - 1) % measure_every == 0:
                pause = time.monotonic()
                state = self._measure_deltas(state, done - 1)
                self._speed.skip(time.monotonic() - pause)
            with profile.step(done):
                state, metrics = step(state, phase.partner, setting.train_split.arrays, batch)
            profile.after(done, metrics)
            if done == start + 1:
                jax.block_until_ready(metrics)
                self._speed.restart(done)  # compiling does not count as speed
            if diagnose_every and done % diagnose_every == 0:
                pause = time.monotonic()
                self._diagnose(state)
                self._speed.skip(time.monotonic() - pause)
            if due is not None:
                due = self._record(*due)
            if done % log_every == 0 or done == phase.steps:
                due = (done, metrics)
            stops = stop.is_due()
            if done % save_every == 0 or done == phase.steps or stops:
                if due is not None:
                    due = self._record(*due)
                pause = time.monotonic()
                self._save(state, done)
                self._speed.skip(time.monotonic() - pause)
            if stops:
                self._checkpoints.wait()
                stop.check(f'after step {done} of {phase.steps} of phase {phase.name}; a checkpoint is saved')

    def _measure_every(self) -> int:
        """Steps between two measurements of estimators' strengths; 0 if no estimator needs one."""
        quantizers = self._phase.problem.replacement.quantization.quantizers()
        if not any(quantizer.estimator.needs_delta for _, _, quantizer in quantizers):
            return 0
        return max(1, self._setting.steps(self._setting.config.quant.trace, 'every_'))

    def _measure_deltas(self, state: TrainState, done: int) -> TrainState:
        """Returns the state with strengths measured anew on the next batches; a function of state and batches alone."""
        setting, phase, settings = self._setting, self._phase, self._setting.trace
        self._measure = self._measure or make_measurement(phase.problem, settings, phase.replicas)
        arrays = setting.train_split.arrays
        found = [
            self._measure(state, phase.partner, arrays, batch, jnp.int32(number))
            for number, batch in enumerate(phase.batches(setting, done, done + settings.batches))
        ]
        deltas = jax.tree.map(lambda *values: sum(values[1:], values[0]) / len(values), *found)
        values = [value for leaf in jax.tree.leaves(jax.device_get(deltas)) for value in values_of(leaf)]
        self._recorder.record(done, {'mean_delta': sum(values) / len(values)})
        return dataclasses.replace(state, deltas=deltas)

    def _diagnose(self, state: TrainState) -> None:
        phase = self._phase
        state = phase.replicas.first(state)
        diagnose(self._setting, phase.problem, phase.partner, phase.optimizer, state)

    def _record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Records metrics, the mean over replicas."""
        values = {name: values_of(value) for name, value in jax.device_get(metrics).items()}
        self._check_finite(values.pop('first_bad_step'))
        means = {name: sum(found) / len(found) for name, found in values.items()}
        means['seconds'] = time.monotonic() - self._began
        speed = self._speed.images_per_second(step)
        self._recorder.record(step, means if speed is None else {**means, 'images_per_second': speed})

    def _save(self, state: TrainState, step: int) -> None:
        """Saves the state, if it is sound, with its score on the validation split."""
        self._check_finite(values_of(state.first_bad_step))
        self._seconds = time.monotonic() - self._began
        score: float | None = None
        facts: dict[str, Any] = {'next_batch': step, 'seconds': self._seconds}
        if self._setting.validation_split is not None:
            found = evaluate(
                self._evaluation_step,
                state.params,
                state.batch_stats,
                self._setting.validation_split,
                self._setting.evaluation_batch_size,
                self._phase.replicas,
            )
            score = sum(one.top1 for one in found) / len(found)
            facts['validation_top1'] = [one.top1 for one in found]
            self._recorder.record(step, {'validation_top1': score})
        self._checkpoints.save(step, state, facts, score)

    def _check_finite(self, first_bad_steps: list[float]) -> None:
        bad = [int(step) for step in first_bad_steps if step >= 0]
        if not bad:
            return
        self._checkpoints.wait()
        raise UserError(
            f'The loss became NaN or infinite in step {min(bad) + 1} of phase {self._phase.name}. The last good '
            f'checkpoint is that of step {self._checkpoints.latest_step} in {self._checkpoints.directory}. Lower the '
            "learning rates (optimizer.learning_rate, optimizer.quantizers.learning_rate; the partner's: "
            'partner.optimizer.learning_rate) or clip the gradient (optimizer.clip_norm), in another --workdir.'
        )


class _Speedometer:
    """Measures images per second between two records, pauses left out."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self.restart(0)

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()

    def skip(self, seconds: float) -> None:
        self._time += seconds

    def images_per_second(self, step: int) -> float | None:
        """Since the last call; None where no step lies between."""
        steps, seconds = step - self._step, time.monotonic() - self._time
        self.restart(step)
        return steps * self._batch_size / seconds if steps > 0 and seconds > 0 else None
