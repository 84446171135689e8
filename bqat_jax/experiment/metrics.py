"""Writes metrics to metrics.jsonl, TensorBoard and the terminal; `bqat_jax.training.metrics` computes them."""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import rich.console
import rich.progress

from bqat_jax.distributed.processes import is_first
from bqat_jax.storage import Hold, Place, Spool, write_text

logger = logging.getLogger(__name__)

METRICS_FILE = 'metrics.jsonl'
STRENGTH = 'mean_delta'  # the mean measured strength of estimators: at step n, that of the steps from n + 1
VALIDATION = 'validation_'  # prefix of metrics on the validation split
SEND_EVERY = 60.0  # seconds
# Formats of the metrics shown on the terminal; the files have all metrics.
SHOWN = {'loss': 'loss {:.3g}', 'examples_per_second': '{:.0f} examples/s'}


@dataclasses.dataclass(frozen=True)
class Recording:
    """The destinations of metrics.

    Attributes:
        workdir: the run's workdir; files are sent to a bucket every minute and before each checkpoint.
        hold: exclusive write access to the workdir.
        console: where progress is shown.
    """

    workdir: Place
    hold: Hold
    console: rich.console.Console


class Recorder:
    """Records the metrics of one phase, steps `start` to `total`; use as a context manager.

    Lines of this phase that an earlier process recorded after `start`, its last checkpoint, are removed: those steps
    are repeated.
    """

    def __init__(self, place: Recording, phase: str, start: int | None, total: int):
        """Opens the files; `start` is None if the phase has no checkpoint, not even of step 0."""
        self._place, self._phase, self._start, self._total = place, phase, start or 0, total
        self._console = place.console
        self._spool = Spool(place.workdir)
        self._spool.fetch(METRICS_FILE)
        path = self._spool.local / METRICS_FILE
        _remove_after(path, phase, -1 if start is None else start)
        self._file = path.open('a', encoding='utf-8')
        self._events: Any = None
        self._sent = time.monotonic()
        self._began = time.monotonic()
        self._progress = None
        self._latest: dict[str, float] = {}
        if self._console.is_terminal:
            self._progress = rich.progress.Progress(
                rich.progress.TextColumn('{task.description}'),
                rich.progress.BarColumn(bar_width=12),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn('{task.fields[shown]}'),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn('left'),
                console=self._console,
            )
            self._task = self._progress.add_task(phase, total=total, completed=self._start, shown='compiling')

    def __enter__(self) -> 'Recorder':
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._progress:
            self._progress.stop()
        if self._events is not None:
            self._events.close()
        self._file.close()
        try:
            self._send_if_held()
        except Exception as error:
            if exception[1] is None:  # otherwise the exception already raised says more
                raise
            logger.warning('The last metrics could not be sent (%s).', type(error).__name__)
        finally:
            self._spool.close()

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step, counted from 1, and shows progress."""
        self._file.write(json.dumps({'phase': self._phase, 'step': step, **metrics}) + '\n')
        self._file.flush()
        events = self._open_events()
        for name, value in metrics.items():
            events.add_scalar(name, value, step)
        events.flush()
        if time.monotonic() - self._sent > SEND_EVERY:
            self._send_if_held()
        if self._progress:
            self._latest |= metrics  # the bar shows the latest value of every metric
            shown = _show(self._latest)
            self._progress.update(self._task, completed=step, shown=shown)
        else:
            line = f'{self._phase} {step}/{self._total}  {_show(metrics)}'
            if step > self._start:
                seconds = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
                line += f'  left {seconds:.0f} s'
            self._console.print(line, markup=False, highlight=False)

    def send(self) -> None:
        """Sends the records to the workdir's bucket; call it before a checkpoint is saved, with the hold."""
        self._spool.send()
        self._sent = time.monotonic()

    def _open_events(self) -> Any:
        if self._events is None:
            # Imported here, after the first step: where PyTorch is installed, tensorboardX loads it (1.4 s).
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._spool.local / 'tensorboard' / self._phase), purge_step=self._start)
        return self._events

    def _send_if_held(self) -> None:
        if self._place.hold.is_held():
            self.send()


class NoRecorder:
    """Records nothing; used by all processes but the first."""

    def __enter__(self) -> 'NoRecorder':
        return self

    def __exit__(self, *exception) -> None:
        pass

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def send(self) -> None:
        """Does nothing."""


def open_recorder(place: Recording, phase: str, start: int | None, total: int) -> Recorder | NoRecorder:
    """Returns the recorder of a phase; only the first process records."""
    return Recorder(place, phase, start, total) if is_first() else NoRecorder()


def _show(metrics: dict[str, float]) -> str:
    shown = [text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics]
    shown += [f'validation {value:.3f}' for name, value in metrics.items() if name.startswith(VALIDATION)]
    return '  '.join(shown)


def _remove_after(path: Path, phase: str, start: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines(keepends=True)
    kept = [line for line in lines if _belongs_before(line, phase, start)]
    if kept != lines:
        write_text(path, ''.join(kept))


def _belongs_before(line: str, phase: str, start: int) -> bool:
    try:
        entry: dict[str, Any] = json.loads(line)
        if not isinstance(entry['step'], int):
            return False
    except (ValueError, TypeError, KeyError):  # an incomplete line of a killed process, or a foreign line
        return False
    if entry.get('phase') == phase and entry['step'] == start and STRENGTH in entry:  # the strength is measured again
        return False
    return line.endswith('\n') and (entry.get('phase') != phase or entry['step'] <= start)
