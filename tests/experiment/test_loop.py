"""The loop calls hooks in order, at the steps that they are due at."""

import math

import jax
import pytest

from bqat_jax.experiment.hooks import Clock, Log, Save
from bqat_jax.experiment.loop import Hooks, run_steps
from bqat_jax.replacement.task_kinds import CLASSIFICATION
from bqat_jax.replacement.tasks import get_task
from bqat_jax.storage import Hold
from bqat_jax.training.evaluation import Evaluation


def run(batches, start, before=(), after=()):
    calls = []

    def note_before(name):
        def hook(done, state):
            calls.append((name, done, state))
            return state + 100

        return hook

    def note_after(name):
        return lambda number, state, metrics: calls.append((name, number, state, metrics))

    hooks = Hooks(
        [(every, note_before(f'before {every}')) for every in before],
        [(every, note_after(f'after {every}')) for every in after],
    )
    return run_steps(lambda state, batch: (state + batch, -batch), 0, batches, start, hooks), calls


def test_a_step_for_every_batch():
    assert run([1, 2, 3], 0) == (6, [])
    assert run([], 5) == (0, [])


def test_hooks_are_called_around_the_steps_that_they_are_due_at():
    state, calls = run([1, 1, 1], 0, before=[2], after=[1, 3])
    assert calls == [
        ('before 2', 0, 0),
        ('after 1', 1, 101, -1),
        ('after 1', 2, 102, -1),
        ('before 2', 2, 102),
        ('after 1', 3, 203, -1),
        ('after 3', 3, 203, -1),
    ]
    assert state == 203


def test_a_resumed_loop_goes_on_with_the_same_hooks():
    """What is due before step 5 is called by whoever makes step 5, and not twice."""
    whole = run([1] * 6, 0, before=[4])[1]
    first, second = run([1] * 4, 0, before=[4])[1], run([1] * 2, 4, before=[4])[1]
    assert [done for _, done, _ in whole] == [done for _, done, _ in first + second] == [0, 4]


class Recorder:
    def __init__(self):
        self.records = []

    def record(self, step, metrics):
        self.records.append((step, sorted(metrics)))

    def send(self):
        self.records.append(('sent', []))


class StopNow:
    def is_due(self):
        return True

    def check(self, where):
        self.where = where


class Checkpoints:
    def __init__(self):
        self.saved = []

    def wait(self):
        pass

    def save(self, step, state, facts, score):
        self.saved.append((step, facts['next_batch'], score))


class State:
    first_bad_step, params, collections = -1, None, None


def test_metrics_are_recorded_after_the_next_step_has_begun():
    recorder, log = Recorder(), None
    log = Log(recorder, Clock(0.0, 8), lambda bad: None)
    hook = log.hook(every=2, last=5)
    seen = []
    for number in range(1, 6):
        hook(number, None, {'loss': jax.numpy.float32(number), 'first_bad_step': jax.numpy.int32(-1)})
        seen.append(len(recorder.records))
    assert seen == [0, 0, 1, 1, 2]
    log.flush()
    log.flush()
    assert [step for step, _ in recorder.records] == [2, 4, 5]
    assert recorder.records[1] == (4, ['examples_per_second', 'loss', 'seconds'])


def test_a_checkpoint_is_saved_when_due_and_at_the_end_behind_the_metrics_of_its_step():
    recorder, checkpoints = Recorder(), Checkpoints()
    log = Log(recorder, Clock(0.0, 8), lambda bad: None)
    logs, saves = (
        log.hook(every=1, last=5),
        Save(checkpoints, log, None, CLASSIFICATION.score, Hold()).hook(every=2, last=5),
    )
    for number in range(1, 6):
        logs(number, None, {'loss': jax.numpy.float32(0), 'first_bad_step': jax.numpy.int32(-1)})
        saves(number, State(), None)
        if number in (2, 4, 5):
            assert [step for step, _ in recorder.records[-2:]] == [number, 'sent']
    assert checkpoints.saved == [(2, 2, None), (4, 4, None), (5, 5, None)]


@pytest.mark.parametrize(('task', 'sign'), [('classification', 1), ('regression', -1)])
def test_the_score_of_a_checkpoint_is_larger_for_a_better_network(task, sign):
    metric, recorder, checkpoints = get_task(task).score, Recorder(), Checkpoints()
    evaluations = iter([(0.25, 0.75), (math.nan, 0.5)])

    def evaluation(params, collections):
        return [Evaluation({metric.name: value}, 8) for value in next(evaluations)]

    save = Save(checkpoints, Log(recorder, Clock(0.0, 8), lambda bad: None), evaluation, metric, Hold())
    save.save(1, State())
    save.save(2, State())
    assert [score for _, _, score in checkpoints.saved] == [sign * 0.5, -math.inf]
    assert recorder.records[0] == (1, [f'validation_{metric.name}'])


def test_a_checkpoint_of_a_stop_is_not_evaluated_and_never_selected():
    """What a run ends with does not depend on where it was stopped."""
    checkpoints, evaluated = Checkpoints(), []

    def evaluation(params, collections):
        evaluated.append(params)
        return [Evaluation({'top1': 0.5}, 8)]

    save = Save(checkpoints, Log(Recorder(), Clock(0.0, 8), lambda bad: None), evaluation, CLASSIFICATION.score, Hold())
    after = save.stop_hook(StopNow(), 'after step {number}')
    after(3, State(), None)
    assert checkpoints.saved == [(3, 3, -math.inf)] and not evaluated
    save.save(4, State())
    after(4, State(), None)  # saved already
    assert [(step, score) for step, _, score in checkpoints.saved] == [(3, -math.inf), (4, 0.5)] and len(evaluated) == 1


def test_a_loss_that_is_not_finite_is_never_saved():
    def check(bad):
        raise ValueError(bad)

    checkpoints = Checkpoints()
    save = Save(checkpoints, Log(Recorder(), Clock(0.0, 8), check), None, CLASSIFICATION.score, Hold())
    with pytest.raises(ValueError, match='-1'):
        save.save(3, State())
    assert checkpoints.saved == []
