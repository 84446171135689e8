"""Traces of training steps by `jax.profiler`."""

from typing import Any

import jax

from bqat_jax.storage import Place, Spool
from bqat_jax.training.state import TrainState

FOLDER = 'profile'


class Trace:
    """Traces host and devices during a range of steps; a context manager with two hooks."""

    def __init__(self, directory: Place, first: int, last: int):
        """Takes the folder for the trace, and the first and the last step, counted from 1; 0 for no trace."""
        self._directory, self._first, self._last = directory, first, last
        self._spool: Spool | None = None
        self._is_on = False

    def __enter__(self) -> 'Trace':
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop()

    def start(self, done: int, state: TrainState) -> TrainState:
        """Starts the trace before its first step."""
        if done + 1 == self._first:
            self._spool = Spool(self._directory)
            jax.profiler.start_trace(str(self._spool.local))
            self._is_on = True
        return state

    def stop(self, number: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """Stops the trace once the devices have finished its last step."""
        del state
        if self._is_on and number == self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
            assert self._spool is not None
            self._spool.send()
            self._spool.close()
