"""Hooks of the training loop: logging, saving, stopping, diagnosing, measuring strengths."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.replicas import values_of
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Checkpoints
from bqat_jax.experiment.loop import After, Before
from bqat_jax.experiment.metrics import STRENGTH, VALIDATION, NoRecorder, Recorder
from bqat_jax.replacement.tasks import Metric
from bqat_jax.storage import Hold
from bqat_jax.training.evaluation import Evaluation
from bqat_jax.training.state import TrainState
from bqat_jax.training.strengths import mean_strengths

# The score of a checkpoint that is selected only if there is no other.
NO_CANDIDATE = float('-inf')


class Clock:
    """Times a phase; its examples per second exclude pauses."""

    def __init__(self, seconds: float, examples_per_step: int):
        """Starts at the seconds that earlier processes spent in the phase."""
        self._began = time.monotonic() - seconds
        self._examples_per_step = examples_per_step
        self.restart(0)

    @property
    def seconds(self) -> float:
        """Seconds of the phase, including those of earlier processes."""
        return time.monotonic() - self._began

    def restart(self, step: int) -> None:
        """Restarts the measurement of speed after a step."""
        self._step, self._time = step, time.monotonic()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time within the context from the speed."""
        began = time.monotonic()
        yield
        self._time += time.monotonic() - began

    def examples_per_second(self, step: int) -> float | None:
        """Returns the speed since the last call or restart; None if no step was made since."""
        steps, seconds = step - self._step, time.monotonic() - self._time
        self.restart(step)
        return steps * self._examples_per_step / seconds if steps > 0 and seconds > 0 else None


class Log:
    """Records metrics at an interval of steps.

    Metrics are fetched after the following step has been dispatched, so that the devices never wait for the host.
    """

    def __init__(self, recorder: Recorder | NoRecorder, clock: Clock, check_finite: Callable[[list[float]], None]):
        """Takes the recorder, the clock, and a check of 'first_bad_step' that raises for a loss that is not finite."""
        self.recorder, self.clock, self.check_finite = recorder, clock, check_finite
        self._pending: tuple[int, Any] | None = None
        self._is_compiled = False

    def hook(self, every: int, last: int) -> After:
        """Returns the hook, to be called after every step; it logs every `every` steps and the last."""

        def after(number, state, metrics):
            del state
            if not self._is_compiled:
                jax.block_until_ready(metrics)
                self.clock.restart(number)  # compiling does not count as speed
                self._is_compiled = True
            self.flush()
            if number % every == 0 or number == last:
                self._pending = number, metrics

        return after

    def flush(self) -> None:
        """Records the pending metrics."""
        if self._pending is None:
            return
        (number, metrics), self._pending = self._pending, None
        values = {name: values_of(value) for name, value in jax.device_get(metrics).items()}
        self.check_finite(values.pop('first_bad_step'))
        means = {name: sum(replicas) / len(replicas) for name, replicas in values.items()}
        means['seconds'] = self.clock.seconds
        speed = self.clock.examples_per_second(number)
        self.recorder.record(number, means if speed is None else {**means, 'examples_per_second': speed})


class Save:
    """Saves checkpoints, with a score if there is a validation split."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        log: Log,
        evaluation: Callable[[Any, Any], tuple[Evaluation, ...]] | None,
        metric: Metric,
        hold: Hold,
    ):
        """Takes the checkpoints, the log, `evaluation(params, collections)` on the validation split or None, the metric
        that is the score, and the hold on the workdir.
        """
        self.checkpoints = checkpoints
        self.seconds = 0.0  # seconds of the phase at the last save
        self._log, self._evaluation, self._metric, self._hold = log, evaluation, metric, hold
        self._saved: int | None = None

    def hook(self, every: int, last: int) -> After:
        """Returns the hook, to be called after every step; it saves every `every` steps and the last."""

        def after(number, state, metrics):
            del metrics
            if number % every == 0 or number == last:
                self.save(number, state)

        return after

    def stop_hook(self, stop: StopRequest, where: str) -> After:
        """Returns the hook, to be called after every step, that saves and raises `Stopped` once a stop is requested.

        Args:
            stop: the request; all processes must check it after every step.
            where: text with a field {number} for the step.
        """

        def after(number, state, metrics):
            del metrics
            if stop.is_due():
                if self._saved != number:
                    self.save(number, state, is_candidate=False)
                self.checkpoints.wait()
                stop.check(f'{where.format(number=number)}; a checkpoint is saved')

        return after

    def save(self, number: int, state: TrainState, *, is_candidate: bool = True) -> None:
        """Saves the state after step `number`, unless it is not finite.

        Args:
            number: steps done.
            state: the state after them.
            is_candidate: whether the checkpoint is scored and may be selected. One that is saved for a stop is not: the
                result of a run must not depend on where it was stopped.

        Raises:
            UserError: if the loss was not finite, the checkpoint cannot be written, or another run holds the workdir.
        """
        self._log.flush()
        with self._log.clock.pause():
            self._log.check_finite(values_of(state.first_bad_step))
            self.seconds = self._log.clock.seconds
            score: float | None = None
            facts: dict[str, Any] = {'next_batch': number, 'seconds': self.seconds}
            if self._evaluation is not None and not is_candidate:
                score = NO_CANDIDATE
            elif self._evaluation is not None:
                name = f'{VALIDATION}{self._metric.name}'
                values = [one.metrics[self._metric.name] for one in self._evaluation(state.params, state.collections)]
                mean = sum(values) / len(values)
                score = self._metric.rank(mean)
                facts[name] = values
                self._log.recorder.record(number, {name: mean})
            self._hold.check()
            self._log.recorder.send()  # first: a run that resumes here needs the lines up to this step
            self.checkpoints.save(number, state, facts, score)
        self._saved = number


def make_finite_check(phase: str, checkpoints: Checkpoints) -> Callable[[list[float]], None]:
    """Returns a check of the replicas' first bad steps (-1 for none) that raises UserError if there is one."""

    def check(first_bad_steps):
        bad = [int(step) for step in first_bad_steps if step >= 0]
        if not bad:
            return
        checkpoints.wait()
        raise UserError(
            f'The loss or a parameter became NaN or infinite in step {min(bad) + 1} of phase {phase}. The last good '
            f'checkpoint is that of step {checkpoints.latest_step} in {checkpoints.directory}. Lower the '
            "learning rates (optimizer.learning_rate, optimizer.quantizers.learning_rate; the partner's: "
            'partner.optimizer.learning_rate) or clip the gradient (optimizer.clip_norm), in another --workdir.'
        )

    return check


def strengths_hook(
    measure: Callable[[TrainState, Any, jax.Array], Any],
    batches: Callable[[int], Iterator[Any]],
    log: Log,
) -> Before:
    """Returns a hook that measures the strengths of estimators; they depend on state and batches alone.

    Args:
        measure: `measure(state, batch, number)` returns the strengths on one batch.
        batches: `batches(done)` yields the batches of one measurement after `done` steps.
        log: records their mean, and has the clock.
    """

    def before(done, state):
        if done == 0:  # strengths are 0 before the first measurement, as in the paper
            return state
        with log.clock.pause():
            of_batches = [measure(state, batch, jnp.int32(number)) for number, batch in enumerate(batches(done))]
            strengths = mean_strengths(of_batches)
            values = [value for leaf in jax.tree.leaves(jax.device_get(strengths)) for value in values_of(leaf)]
            log.recorder.record(done, {STRENGTH: sum(values) / len(values)})
        return dataclasses.replace(state, strengths=strengths)

    return before


def diagnosis_hook(diagnose: Callable[[TrainState], Any], clock: Clock) -> After:
    """Returns a hook that diagnoses the state."""

    def after(number, state, metrics):
        del number, metrics
        with clock.pause():
            diagnose(state)

    return after
