"""Diagnoses finished runs, such as those of a sweep, and writes the results to one table.

Command: python -m research.diagnose_runs --table=TABLE.md WORKDIR [WORKDIR ...]

Each workdir is diagnosed as by `main.py --mode=diagnose`, unless it has a diagnosis already. Runs whose workdirs share
a parent are seeds of one method, and the table has their mean. With replicas the first one is diagnosed.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging

from bqat_jax.analysis.diagnosis import DIRECTORY
from bqat_jax.errors import UserError
from bqat_jax.experiment.run import diagnose_run
from bqat_jax.storage import read_json, write_text

COLUMNS = (
    'LP loss: cosine to FP',
    'to smoothed',
    'full loss: cosine to FP',
    'to smoothed',
    'variance, LP loss',
    'full loss',
    'CKA of the last block',
    'its relative error',
    'oscillating, %',
)


def find_or_make(workdir: Path) -> dict[str, Any]:
    """Returns the newest diagnosis in a workdir; makes one if there is none.

    Raises:
        UserError: if the workdir holds no run.
    """
    if not (workdir / 'config.json').is_file():
        raise UserError(f'{workdir} holds no run (no config.json in it).')
    made = sorted((workdir / DIRECTORY).glob('step_*.json'), key=lambda path: int(path.stem.removeprefix('step_')))
    if not made:
        made = [Path(diagnose_run(ml_collections.ConfigDict(read_json(workdir / 'config.json')), workdir)['json'])]
        jax.clear_caches()  # the next run has other programs
    return read_json(made[-1])


def measures_of(diagnosis: dict[str, Any]) -> list[float]:
    """Returns the values of a diagnosis for the columns of the table: means over blocks, or over layers."""

    def mean(loss, measure):
        return statistics.mean(block[measure] for block in diagnosis['gradients'][loss]['blocks'].values())

    cosines = [
        mean(loss, f'cosine_to_{reference}') for loss in ('lp', 'full') for reference in ('full_precision', 'smoothed')
    ]
    *_, last = diagnosis['features'].values()
    watched = diagnosis.get('oscillating')
    oscillating = 100 * statistics.mean(watched.values()) if watched else float('nan')
    variances = [mean(loss, 'variance') for loss in ('lp', 'full')]
    return [*cosines, *variances, last['cka'], last['relative_error'], oscillating]


def write_table(path: Path, rows: dict[str, list[list[float]]]) -> None:
    """Writes the table, with the mean over runs in a row for each name."""
    lines = [f'| runs | seeds | {" | ".join(COLUMNS)} |', '|' + '---|' * (len(COLUMNS) + 2)]
    for name, measures in rows.items():
        means = [statistics.mean(values) for values in zip(*measures, strict=True)]
        lines.append(f'| {name} | {len(measures)} | {" | ".join(f"{value:.3f}" for value in means)} |')
    write_text(path, '\n'.join(lines) + '\n')


def diagnose_runs(workdirs: Sequence[Path], table: Path) -> None:
    """Diagnoses runs without a diagnosis, and updates the table after each.

    Raises:
        UserError: if a workdir holds no run.
    """
    rows: dict[str, list[list[float]]] = {}
    for workdir in workdirs:
        name = '/'.join(workdir.absolute().parts[-3:-1])
        rows.setdefault(name, []).append(measures_of(find_or_make(workdir)))
        write_table(table, rows)


def main(argv: list[str]) -> None:
    """Reads the command line."""
    logging.set_verbosity(logging.ERROR)
    if len(argv) < 2:
        raise app.UsageError('Which runs? Name their workdirs.')
    try:
        diagnose_runs([Path(name) for name in argv[1:]], Path(flags.FLAGS.table))
    except UserError as error:
        raise SystemExit(f'Error: {error}') from error


if __name__ == '__main__':
    flags.DEFINE_string('table', 'diagnoses.md', 'File of the table.')
    app.run(main)
