"""Requests to stop (SIGTERM, one Ctrl-C, or a deadline), which take effect at the next step."""

import dataclasses
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """Training has stopped on request and can resume."""


@dataclasses.dataclass(frozen=True)
class Deadline:
    """A time at which to stop.

    Attributes:
        at: the time, in seconds of `time.monotonic()`.
        name: the setting it comes from, for messages, such as 'sweep_minutes=10'.
    """

    at: float
    name: str


class StopRequest:
    """A context manager that records SIGTERM and SIGINT; a second SIGINT interrupts at once.

    In a run of one process, a deadline that has passed is a request too.

    With several processes, SIGTERM to any of them stops all at one point: JAX's preemption service records the signal.
    SIGINT interrupts.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None, deadline: Deadline | None = None):
        """Takes a function to call when a signal arrives, and a deadline."""
        self._on_request, self._deadline = on_request, deadline
        self._signal_name: str | None = None
        self._before: dict[int, Any] = {}
        self._points = 0

    def __enter__(self) -> 'StopRequest':
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_due(self) -> bool:
        """Returns whether to stop here; all processes must ask at the same points."""
        if self._signal_name is None and jax.process_count() > 1:
            self._points += 1
            if multihost_utils.reached_preemption_sync_point(self._points):
                self._signal_name = 'SIGTERM'
                self._on_request()
        elif self._signal_name is None and self._deadline is not None and time.monotonic() >= self._deadline.at:
            self._signal_name = self._deadline.name
        return self._signal_name is not None

    def check(self, where: str) -> None:
        """Raises Stopped if a stop is due; for points at which there is nothing to save.

        Args:
            where: where training stopped, for the message.
        """
        if self.is_due():
            raise Stopped(f'Stopped by {self._signal_name} {where}. Run the same command again to continue.')

    def _note(self, number, frame) -> None:
        del frame
        if number == signal.SIGINT and self._signal_name is not None:
            raise KeyboardInterrupt
        self._signal_name = signal.Signals(number).name
        self._on_request()
