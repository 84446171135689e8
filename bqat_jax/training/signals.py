"""A request to stop (SIGTERM, or Ctrl-C once) is noted, and acted on at the next step."""

import signal
from typing import Any


class Stopped(Exception):
    """Training was asked to stop, has saved a checkpoint and can be continued."""


class StopRequest:
    """Notes SIGTERM and SIGINT while it is open, as a context manager; a second SIGINT interrupts at once.

    Attributes:
        signal_name: 'SIGTERM' or 'SIGINT' once one came, else None.
    """

    def __init__(self):
        self.signal_name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        del frame
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
