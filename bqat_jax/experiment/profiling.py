"""Traces of single training steps, made by `jax.profiler`."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from bqat_jax.experiment.configuration import Config

FOLDER = 'profile'


class Profile:
    """Records what host and devices do during some steps of a phase; use as a context manager around its steps."""

    def __init__(self, directory: Path, first: int, last: int):
        """Takes the folder for the trace, and the first and the last step; with `first` 0 nothing is recorded."""
        self._directory, self._first, self._last = directory, first, last
        self._is_on = False

    def __enter__(self) -> 'Profile':
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop()

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Returns what a step is to run in; the trace begins here if it is the first."""
        if number == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._is_on = True
        return jax.profiler.StepTraceAnnotation('train', step_num=number) if self._is_on else contextlib.nullcontext()

    def after(self, number: int, metrics: Any) -> None:
        """Ends the trace if the step was the last, when the devices are done with it."""
        if self._is_on and number == self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()


def make_profile(config: Config, workdir: Path, phase: str) -> Profile:
    """Returns the profile of a phase that the config asks for, `workdir/profile/<phase>`."""
    first, last = config.profile_steps if config.profile else (0, 0)
    return Profile(workdir / FOLDER / phase, first, last)
