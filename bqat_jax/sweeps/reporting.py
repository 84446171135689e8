"""The report of a sweep, and `--mode=report` for the run or sweep in a workdir."""

import logging
import statistics
from collections.abc import Mapping
from typing import Any

import jax

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, base_config, changed_values, to_plain
from bqat_jax.experiment.metrics import VALIDATION
from bqat_jax.experiment.reporting import REPORT_FILE, report_run
from bqat_jax.experiment.workdir import CONFIG, ENVIRONMENT
from bqat_jax.replacement.tasks import Metric
from bqat_jax.report.sweep_page import SweepRecord, sweep_page
from bqat_jax.storage import Place, check_reachable, read_json, write_text
from bqat_jax.sweeps.definition import Sweep, load_sweep
from bqat_jax.sweeps.tables import TABLES, metric_of, student_interval

logger = logging.getLogger(__name__)


def report(config: Config, workdir: Place) -> dict[str, Any]:
    """Writes `report.html` of the sweep or the run in a workdir, and returns its path.

    Raises:
        UserError: if the workdir holds neither, or it has another config.
    """
    check_reachable(workdir, '--workdir')
    if not (workdir / TABLES).is_file():
        if config.sweep and not (workdir / CONFIG).is_file():
            raise UserError(
                f'{workdir} holds no table of a sweep (no {TABLES} in it): its first method has not finished. Run the '
                'sweep (--mode=sweep).'
            )
        return report_run(config, workdir)
    if jax.process_count() > 1:
        raise UserError('--mode=report runs in one process: leave config.distributed at its default, off.')
    sweep = load_sweep(config.sweep) if config.sweep else None
    return {'report': str(write_report(config, workdir, sweep, metric_of(config)))}


def report_at_the_end(config: Config, workdir: Place, sweep: Sweep, metric: Metric) -> Place | None:
    """Writes the report of a sweep that has ended, and returns its path; after a failure, logs a warning."""
    try:
        return write_report(config, workdir, sweep, metric)
    except Exception as error:  # the tables are written; a report must not fail the sweep
        logger.warning(
            'The report of %s could not be written (%s: %s). The sweep is complete; --mode=report with its flags '
            'writes the report.',
            workdir,
            type(error).__name__,
            str(error).partition('\n')[0],
        )
        return None


def write_report(config: Config, workdir: Place, sweep: Sweep | None, metric: Metric) -> Place:
    """Writes the report of a sweep from its tables and returns its path.

    Args:
        config: the config of all runs.
        workdir: the sweep's workdir.
        sweep: its definition; None if unknown.
        metric: the metric to compare.

    Raises:
        UserError: if the tables are damaged.
    """
    tables = read_json(workdir / TABLES, baseline=str, settings=dict)
    settings = tables['settings']
    record = SweepRecord(
        name=workdir.name,
        workdir=str(workdir),
        baseline=tables['baseline'],
        settings=settings,
        metric=metric,
        validation=f'{VALIDATION}{metric.name}',
        intervals={setting: _intervals(methods, metric.name) for setting, methods in settings.items()},
        definition=None if sweep is None else _describe(sweep),
        seeds=_seeds(settings),
        changes=changed_values(to_plain(base_config()), to_plain(config)),
        environment=_environment(workdir, settings),
    )
    path = workdir / REPORT_FILE
    write_text(path, sweep_page(record))
    return path


def _intervals(methods: Mapping[str, Any], metric: str) -> dict[str, tuple[float, float, float] | None]:
    """The mean over seeds of every method, with its interval; None without a result."""
    intervals: dict[str, tuple[float, float, float] | None] = {}
    for method, row in methods.items():
        values = [score[metric] for score in row['by_seed'].values()]
        if len(values) > 1:
            intervals[method] = student_interval(values)
        else:
            intervals[method] = (statistics.mean(values), float('nan'), float('nan')) if values else None
    return intervals


def _describe(sweep: Sweep) -> list[tuple[str, str, str, Any]]:
    """The overrides of a sweep as (setting or method, its name, key, value)."""
    parts = [('setting', sweep.settings), ('method', sweep.methods)]
    return [
        (kind, name, key, value)
        for kind, named in parts
        for name, overrides in named.items()
        for key, value in overrides.items()
    ]


def _seeds(settings: Mapping[str, Any]) -> list[str]:
    seen = {seed: None for methods in settings.values() for row in methods.values() for seed in row['by_seed']}
    return list(seen)


def _environment(workdir: Place, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and devices of the first run that has them; {} if none has."""
    for setting, methods in settings.items():
        for method in methods:
            folder = workdir / setting / method
            for run in sorted(folder.iterdir(), key=str) if folder.is_dir() else ():
                try:
                    if (run / ENVIRONMENT).is_file():
                        return read_json(run / ENVIRONMENT)
                except (UserError, OSError):
                    continue
    return {}
