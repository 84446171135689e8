"""Runs the missing parts of a sweep; a sweep resumes after a kill."""

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
    """One call of the training program: one seed, or several in parallel.

    Attributes:
        workdir: the run's workdir.
        config: the run's config, which has the seeds.
    """

    workdir: Place
    config: Config

    @property
    def seeds(self) -> range:
        """The seeds of the run."""
        return range(self.config.seed, self.config.seed + self.config.train.replicas)


def run_sweep(config: Config, workdir: Place, *, name: str) -> dict[str, Any]:
    """Runs the missing runs of a sweep; writes `sweep.json`, `sweep.csv`, `sweep.md`, `sweep.png`, and at the end
    `report.html`.

    The error of a failed run is recorded, and the sweep continues; the run is not repeated unless its error.json is
    removed. The tables are updated whenever a method is complete.

    Args:
        config: the config of all runs; `config.sweep` names the file that defines the sweep.
        workdir: folder of all files of the sweep.
        name: name of the config, for the record.

    Returns:
        The number of runs, the number that failed, and the files.

    Raises:
        UserError: for a sweep or a workdir that cannot work.
        Stopped: if SIGTERM or SIGINT came, or `config.sweep_minutes` have passed; a second call resumes, here, or
            elsewhere from `config.sweep_pack`.
    """
    return compare(load_sweep(config.sweep), config, workdir, name=name)


def compare(sweep: Sweep, config: Config, workdir: Place, *, name: str) -> dict[str, Any]:
    """Runs the missing runs of a `Sweep` object; see `run_sweep`."""
    if jax.process_count() > 1:
        raise UserError(f'distributed={config.distributed!r}: a sweep runs in one process.')
    metric = metric_of(config)
    for setting in sweep.settings.values():  # typos are reported before hours of work
        for method in sweep.methods.values():
            for choice in sweep.choices or [{}]:
                changed = override(config, setting, method, choice)
                _check_choice(sweep, changed)
                if metric_of(changed) != metric:
                    raise UserError(
                        f'task={changed.task!r}: a sweep compares runs by one metric, and that of {config.task!r} is '
                        f'{metric.name}. Use one sweep per task.'
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
    if sweep.choices and config.data.validation_fraction == 0 and config.data.validation_split is None:
        raise UserError(
            'data.validation_fraction=0: the sweep chooses between overrides and needs a validation split. Hold out a '
            'part of the training images, or set data.validation_split; the test split must not select anything.'
        )


@contextlib.contextmanager
def _compilation_cache(directory: Place) -> Iterator[None]:
    """Shares compiled programs between runs."""
    values = {
        'jax_compilation_cache_dir': str(directory),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
    }
    before = {key: getattr(jax.config, key) for key in values}
    if before['jax_compilation_cache_dir']:
        del values['jax_compilation_cache_dir']  # the user has set one
    for key, value in values.items():
        jax.config.update(key, value)
    try:
        yield
    finally:
        for key in values:
            jax.config.update(key, before[key])


@dataclasses.dataclass
class _Execution:
    """A running sweep."""

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
        self.console.print(f'Every run writes log.txt in its folder below {self.workdir}.', soft_wrap=True)
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
        files = ', '.join(str(self.workdir / f'sweep.{kind}') for kind in ('json', 'csv', 'md', 'png'))
        summary = {'runs': runs, 'failed': failed, 'tables': files}
        if self.config.report:
            self.hold.check()
            report = report_at_the_end(self.config, self.workdir, self.sweep, self.metric)
            summary |= {'report': str(report)} if report else {}
        return summary

    def _prepare_partner(self, config: Config, folder: Place) -> Place:
        """The workdir with the partner of a setting: that of the config, or one that all runs of the setting share."""
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
        """Runs a method with a choice; returns its rank, where larger is better, and -inf if a seed failed."""
        where = folder / 'choices' / _label(candidate)
        scores = self._run_seeds(override(config, candidate), where, self.sweep.choice_seeds, entry)
        name = f'{VALIDATION}{self.metric.name}'
        values = [score[name] for score in scores.values()]
        seconds = sum(score['seconds'] for score in scores.values())
        entry['choices'].append({'overrides': dict(candidate), name: values, 'seconds': seconds})
        is_complete = len(values) == len(self.sweep.choice_seeds)
        return self.metric.rank(sum(values) / len(values)) if is_complete else -math.inf

    def _run_seeds(self, config: Config, folder: Place, seeds: Sequence[int], entry: dict[str, Any]) -> dict[str, Any]:
        """Runs all seeds, `train.replicas` of them in parallel; returns the results of those that did not fail."""
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
        """Returns the result of a run or its error; runs it if it has neither."""
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
        except (Stopped, KeyboardInterrupt, BucketError, InUse, Lost):  # not an error of this run, which can run later
            raise
        except Exception as error:  # the sweep continues after any error
            result = {'error': f'{type(error).__name__}: {error}', 'traceback': traceback.format_exc()}
            if (where := place_in_plugins(error)) is not None:
                result['plugin'] = where
            self.hold.check()
            write_json(run.workdir / ERROR, result)
            self.console.print(f'  failed: {result["error"]}', markup=False)
        else:
            name = self.metric.name
            self.console.print(f'  {name} {result[name]:.4f}  {time.monotonic() - began:.0f} s', highlight=False)
        jax.clear_caches()  # the next run has other programs
        return result


def _by_seed(run: Run, result: dict[str, Any], metric: str) -> dict[str, Any]:
    """Splits a result of several seeds by seed."""
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
    """A console that writes to a file in the run's workdir."""
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
    """A folder's name for overrides: the last part of every key with its value, without repetitions."""
    parts: list[str] = []
    for key, value in overrides.items():
        text = re.sub(r'[^A-Za-z0-9_.+-]+', '-', f'{key.rpartition(".")[2]}={value}'.replace('=', ' '))
        if text not in parts:
            parts.append(text)
    return '+'.join(parts) or 'as it is'
