"""Runs what of a sweep is missing: after a kill, the same command goes on where it was."""

import contextlib
import dataclasses
import math
import re
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import rich.console

from bqat_jax.distributed.preemption import Deadline, Stopped, StopRequest
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, check_resumable, to_plain
from bqat_jax.experiment.keys import BY_NAME
from bqat_jax.experiment.metrics import VALIDATION
from bqat_jax.experiment.run import PARTNER, prepare_partner, train
from bqat_jax.registry import place_in_plugins
from bqat_jax.replacement.tasks import Metric
from bqat_jax.storage import (
    BucketError,
    Hold,
    InUse,
    Lost,
    Place,
    Spool,
    check_reachable,
    held,
    place,
    read_json,
    shorten_patience,
    write_json,
)
from bqat_jax.sweeps.choices import beyond
from bqat_jax.sweeps.definition import Overrides, Sweep, load_sweep, override
from bqat_jax.sweeps.packing import ERROR, RESULT, unpack, write_pack
from bqat_jax.sweeps.reporting import report_at_the_end
from bqat_jax.sweeps.tables import metric_of, write_tables

LOG = 'log.txt'
LOG_WIDTH = 140


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of the training program: one seed, or several side by side.

    Attributes:
        workdir: of the run.
        config: of the run; it says the seeds.
    """

    workdir: Place
    config: Config

    @property
    def seeds(self) -> range:
        """The seeds of the run."""
        return range(self.config.seed, self.config.seed + self.config.train.replicas)


def run_sweep(config: Config, workdir: Place, *, name: str) -> dict[str, Any]:
    """Runs what is missing of a sweep, and writes `sweep.json`, `sweep.csv`, `sweep.md`, `sweep.png`, and at the end
    `report.html`.

    A run that fails is recorded with its error, and the others go on; it is not tried again unless its error.json is
    removed. The tables are written anew whenever a method is complete.

    Args:
        config: what all runs have in common; `config.sweep` names the file that says what differs.
        workdir: everything goes there.
        name: of the config, for the record.

    Returns:
        How many runs there are, how many of them failed, and the files.

    Raises:
        UserError: for a sweep or a workdir that cannot work.
        Stopped: if SIGTERM or SIGINT came, or `config.sweep_minutes` have passed; what was under way continues by the
            same command, here, or elsewhere from `config.sweep_pack`.
    """
    return compare(load_sweep(config.sweep), config, workdir, name=name)


def compare(sweep: Sweep, config: Config, workdir: Place, *, name: str) -> dict[str, Any]:
    """Runs what is missing of a sweep that is given as an object; all else as `run_sweep`."""
    if jax.process_count() > 1:
        raise UserError(f'distributed={config.distributed!r}: a sweep runs in one process.')
    metric = metric_of(config)
    for setting in sweep.settings.values():  # what is mistyped is told before hours have passed
        for method in sweep.methods.values():
            for choice in sweep.choices or [{}]:
                changed = override(config, setting, method, choice)
                _check_choice(sweep, changed)
                if metric_of(changed) != metric:
                    raise UserError(
                        f'task={changed.task!r}: a sweep compares runs by one metric, and that of {config.task!r} is '
                        f'{metric.name}. Give a sweep for each task.'
                    )
    check_reachable(workdir, '--workdir')
    workdir.mkdir(parents=True, exist_ok=True)
    pack = None if config.sweep_pack is None else place(config.sweep_pack, 'sweep_pack')
    deadline = None
    if config.sweep_minutes is not None:
        deadline = Deadline(time.monotonic() + 60 * config.sweep_minutes, f'sweep_minutes={config.sweep_minutes:g}')
    console = rich.console.Console(markup=False)
    with (
        held(workdir, config.storage.lease_seconds) as hold,
        _compilation_cache(workdir / 'compiled'),
        StopRequest(shorten_patience, deadline) as stop,
    ):
        if pack is not None and pack.is_file():
            console.print(f'{pack}: {unpack(pack, workdir)} files were missing here')
        execution = _Execution(config, sweep, workdir, hold, name, metric, console, stop, deadline)
        try:
            result = execution.execute()
        except Stopped as stopped:
            if pack is None:
                raise
            write_pack(pack, workdir)
            raise Stopped(f'{stopped} {pack} holds what the same command needs to continue on another machine.') from (
                stopped
            )
        if pack is not None:
            write_pack(pack, workdir)
            result['pack'] = str(pack)
        return result


def _check_choice(sweep: Sweep, config: Config) -> None:
    if sweep.choices and config.data.validation_fraction == 0:
        raise UserError(
            'The sweep chooses between overrides, and data.validation_fraction=0 leaves nothing to choose on: hold a '
            'part of the training images out (the test split selects nothing).'
        )


@contextlib.contextmanager
def _compilation_cache(directory: Place) -> Iterator[None]:
    """What one run has compiled the next need not."""
    values = {
        'jax_compilation_cache_dir': str(directory),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
    }
    before = {key: getattr(jax.config, key) for key in values}
    if before['jax_compilation_cache_dir']:
        del values['jax_compilation_cache_dir']  # there is one already
    for key, value in values.items():
        jax.config.update(key, value)
    try:
        yield
    finally:
        for key in values:
            jax.config.update(key, before[key])


@dataclasses.dataclass
class _Execution:
    """A sweep under way."""

    config: Config
    sweep: Sweep
    workdir: Place
    hold: Hold
    name: str
    metric: Metric
    console: rich.console.Console
    stop: StopRequest
    deadline: Deadline | None

    def execute(self) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        runs = failed = 0
        for setting, overrides in self.sweep.settings.items():
            config = override(self.config, overrides)
            # No run depends on these.
            config.sweep = config.sweep_minutes = config.sweep_pack = None
            config.sweep_extend = BY_NAME['sweep_extend'].default
            folder = self.workdir / setting
            config.partner.workdir = str(self._prepare_partner(config, folder))
            config.partner.torch_file = config.partner.torch_key = None
            config.partner.new_head = False
            entries[setting] = {}
            for method, changes in self.sweep.methods.items():
                entry = self._run_method(override(config, changes), folder / method)
                entries[setting][method] = entry
                runs, failed = runs + entry['runs'], failed + len(entry['failed'])
                self.hold.check()
                write_tables(self.workdir, self.sweep, entries, self.metric)
        if self.config.report:
            self.hold.check()
            report_at_the_end(self.config, self.workdir, self.sweep, self.metric)
        files = ', '.join(str(self.workdir / f'sweep.{kind}') for kind in ('json', 'csv', 'md', 'png'))
        return {'runs': runs, 'failed': failed, 'tables': files}

    def _prepare_partner(self, config: Config, folder: Place) -> Place:
        """The workdir with the partner of a setting: the one that the config names, or one made for all its runs."""
        if config.partner.workdir:
            return place(config.partner.workdir, 'partner.workdir')
        single = override(config, {'train.replicas': 1})
        workdir = folder / 'partner_of_all'
        self.stop.check(f'before the partner of {folder.name}')
        self.console.print(f'{folder.name}: partner')
        with _log(workdir) as console:
            prepare_partner(single, workdir, name=self.name, console=console, deadline=self.deadline)
        return workdir

    def _run_method(self, config: Config, folder: Place) -> dict[str, Any]:
        """Chooses a method's overrides, and runs it with all seeds."""
        entry: dict[str, Any] = {'runs': 0, 'failed': [], 'choices': []}
        choice: Overrides = {}
        if self.sweep.choices:
            ranks = [self._try(config, folder, candidate, entry) for candidate in self.sweep.choices]
            candidates = list(self.sweep.choices)
            for _ in range(self.config.sweep_extend):
                added = beyond(candidates, candidates[ranks.index(max(ranks))])
                if max(ranks) == -math.inf or added is None:
                    break
                candidates.append(added)
                ranks.append(self._try(config, folder, added, entry))
                entry['choices'][-1]['added'] = True
            if max(ranks) == -math.inf:
                return entry | {'choice': None, 'by_seed': {}}
            choice = candidates[ranks.index(max(ranks))]
        scores = self._run_seeds(override(config, choice), folder, self.sweep.seeds, entry)
        return entry | {'choice': dict(choice), 'by_seed': scores}

    def _try(self, config: Config, folder: Place, candidate: Overrides, entry: dict[str, Any]) -> float:
        """Runs a method with one of the choices; returns its rank, the larger the better, -inf if a seed failed."""
        where = folder / 'choices' / _label(candidate)
        scores = self._run_seeds(override(config, candidate), where, self.sweep.choice_seeds, entry)
        name = f'{VALIDATION}{self.metric.name}'
        values = [score[name] for score in scores.values()]
        seconds = sum(score['seconds'] for score in scores.values())
        entry['choices'].append({'overrides': dict(candidate), name: values, 'seconds': seconds})
        is_complete = len(values) == len(self.sweep.choice_seeds)
        return self.metric.rank(sum(values) / len(values)) if is_complete else -math.inf

    def _run_seeds(self, config: Config, folder: Place, seeds: Sequence[int], entry: dict[str, Any]) -> dict[str, Any]:
        """Runs all seeds, as many side by side as the config says; returns the results of those that did not fail."""
        together = config.train.replicas
        scores: dict[str, Any] = {}
        for first in range(0, len(seeds), together):
            part = list(seeds)[first : first + together]
            own = override(config, {'seed': part[0], 'train.replicas': len(part)})
            run = Run(folder / f'seeds {part[0]}-{part[-1]}' if len(part) > 1 else folder / f'seed {part[0]}', own)
            entry['runs'] += 1
            result = self._run(run)
            if 'error' in result:
                entry['failed'].append({'workdir': str(run.workdir.relative_to(self.workdir)), **result})
            else:
                scores |= _by_seed(run, result, self.metric.name)
        return scores

    def _run(self, run: Run) -> dict[str, Any]:
        """Returns the result of a run, or its error; runs it if there is neither yet."""
        known = run.workdir / 'config.json'
        if known.exists():
            check_resumable(read_json(known), to_plain(run.config), run.workdir)
        for name, fields in ((RESULT, {self.metric.name: float, 'steps': int}), (ERROR, {'error': str})):
            if (run.workdir / name).exists():
                return read_json(run.workdir / name, **fields)
        self.stop.check(f'before {run.workdir.relative_to(self.workdir)}')
        self.console.print(str(run.workdir.relative_to(self.workdir)))
        began = time.monotonic()
        try:
            with _log(run.workdir) as console:
                result = train(run.config, run.workdir, name=self.name, console=console, deadline=self.deadline)
        except (Stopped, KeyboardInterrupt, BucketError, InUse, Lost):  # it says nothing of this run: it is made later
            raise
        except Exception as error:  # whatever it is, the others go on
            result = {'error': f'{type(error).__name__}: {error}', 'traceback': traceback.format_exc()}
            if (where := place_in_plugins(error)) is not None:
                result['plugin'] = where
            self.hold.check()
            write_json(run.workdir / ERROR, result)
            self.console.print(f'  failed: {result["error"]}', markup=False)
        else:
            name = self.metric.name
            self.console.print(f'  {name} {result[name]:.4f}  {time.monotonic() - began:.0f} s', highlight=False)
        jax.clear_caches()  # the next run has programs of its own
        return result


def _by_seed(run: Run, result: dict[str, Any], metric: str) -> dict[str, Any]:
    """A result of several seeds as one for each."""
    scores = {}
    for seed in map(str, run.seeds):
        scores[seed] = {
            name: result.get(f'{name}_by_seed', {seed: result[name]})[seed]
            for name in (metric, f'{VALIDATION}{metric}')
            if name in result
        }
        scores[seed] |= {key: result[key] for key in (f'{PARTNER}{metric}', 'steps', 'checkpoint_step')}
        scores[seed]['seconds'] = result['seconds'] / len(run.seeds)
    return scores


@contextlib.contextmanager
def _log(workdir: Place) -> Iterator[rich.console.Console]:
    """A console that writes into a file of the run's, for which nobody need make room on the screen."""
    spool = Spool(workdir)
    try:
        spool.fetch(LOG)
        with (spool.local / LOG).open('a', encoding='utf-8') as file:
            yield rich.console.Console(file=file, width=LOG_WIDTH, markup=False)
    except Lost:  # another process writes there now
        raise
    except BaseException:
        spool.send()
        raise
    else:
        spool.send()
    finally:
        spool.close()


def _label(overrides: Overrides) -> str:
    """A folder's name for overrides: the first key's last part and value, and the values of others that differ."""
    parts: list[str] = []
    for key, value in overrides.items():
        text = re.sub(r'[^A-Za-z0-9_.+-]+', '-', f'{key.rpartition(".")[2]}={value}'.replace('=', ' '))
        if text not in parts:
            parts.append(text)
    return '+'.join(parts) or 'as it is'
