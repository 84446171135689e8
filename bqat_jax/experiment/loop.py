"""The training loop: takes a batch, steps, and calls the hooks that are due."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from bqat_jax.training.state import TrainState

# `before(done, state) -> state` gets the number of steps done; `after(number, state, metrics)` that of the step.
Before = Callable[[int, TrainState], TrainState]
After = Callable[[int, TrainState, dict[str, jax.Array]], None]
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Functions called around the steps, in order; each is called every `every` steps.

    Attributes:
        before: (every, function): the function gets the state and returns it, changed or not.
        after: (every, function): the function gets the state and the step's metrics, which may not be computed yet.
    """

    before: Sequence[tuple[int, Before]] = ()
    after: Sequence[tuple[int, After]] = ()


def run_steps(step: Step, state: TrainState, batches: Iterable[Any], start: int, hooks: Hooks) -> TrainState:
    """Makes a step with every batch and returns the state after the last.

    The loop does not wait for a step's result; a hook that needs the result does.

    Args:
        step: `step(state, batch) -> state, metrics`; it may donate `state`.
        state: the state after `start` steps.
        batches: one for each step.
        start: number of steps already done.
        hooks: functions called around the steps.
    """
    for number, batch in enumerate(batches, start + 1):
        for every, before in hooks.before:
            if (number - 1) % every == 0:
                state = before(number - 1, state)
        with jax.profiler.StepTraceAnnotation('train', step_num=number):
            state, metrics = step(state, batch)
        for every, after in hooks.after:
            if number % every == 0:
                after(number, state, metrics)
    return state
