"""A run's workdir: exclusive access, the check that its config matches, and the record written at the start."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from bqat_jax.distributed.processes import agree, gather_bools, is_first, wait_for_all
from bqat_jax.errors import UserError
from bqat_jax.experiment import low_precision, partner
from bqat_jax.experiment.configuration import check_resumable, to_plain
from bqat_jax.experiment.environment import check_environment, describe_environment
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.storage import Hold, Place, check_reachable, held, is_local, read_json, write_bytes, write_once

CONFIG, ENVIRONMENT = 'config.json', 'environment.json'
# Files and folders that exist once a run has computed something.
WORK = (partner.DIRECTORY, low_precision.QUANTIZERS_FILE, low_precision.CHECKPOINTS)
ROLL_CALL = '.processes'


@contextlib.contextmanager
def opened(workdir: Place, lease_seconds: float) -> Iterator[Hold]:
    """Creates a workdir and holds it; the first process holds it for all.

    Args:
        workdir: a local path, or one in an existing bucket.
        lease_seconds: seconds after which another run may use a workdir in a bucket if its lease is not renewed.

    Raises:
        UserError: if another run holds it, a process does not see it, or its bucket cannot be used.
    """
    check_reachable(workdir, '--workdir')
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
    wait_for_all('workdir made')
    _check_is_shared(workdir)
    others = contextlib.nullcontext(Hold(is_in_bucket=not is_local(workdir)))
    with held(workdir, lease_seconds) if is_first() else others as hold:
        yield hold


def check_config(experiment: Experiment) -> None:
    """Checks that a run in the workdir, if any, has this config and a compatible environment.

    Raises:
        UserError: if a key or a setting of JAX that the result depends on differs, or an incompatible version made it.
    """
    workdir = experiment.workdir
    if not agree(any((workdir / name).exists() for name in WORK)):
        return  # an earlier run failed before it computed anything
    if agree((workdir / ENVIRONMENT).exists()):
        recorded = read_json(workdir / ENVIRONMENT, versions=dict)
        check_environment(recorded, workdir, experiment.data.images.description)
    if agree((workdir / CONFIG).exists()):
        check_resumable(read_json(workdir / CONFIG), experiment.config, workdir)


def check_is_run(workdir: Place) -> None:
    """Raises UserError if a workdir holds no run."""
    if not (workdir / CONFIG).is_file():
        raise UserError(f'{workdir} holds no run (no {CONFIG} in it): train first (--mode=train).')


def write_record(experiment: Experiment, name: str, overrides: Mapping[str, Any] | None) -> None:
    """Writes `config.json` and `environment.json`.

    Args:
        experiment: the experiment.
        name: name of the config.
        overrides: keys that the command line changed.
    """
    write_once(experiment.workdir / CONFIG, experiment.config)
    environment = {'config': name, 'overrides': to_plain(overrides or {}), **describe_environment(experiment)}
    write_once(experiment.workdir / ENVIRONMENT, environment)


def _check_is_shared(workdir: Place) -> None:
    """Raises UserError if a process does not see a file that the first one writes into the workdir."""
    if jax.process_count() == 1:
        return
    path = workdir / ROLL_CALL
    if is_first():
        write_bytes(path, b'')
    wait_for_all('roll call')
    seen = gather_bools(path.exists())
    wait_for_all('roll called')
    if is_first():
        path.unlink()
    if not all(seen):
        raise UserError(
            f'--workdir={workdir}: {seen.count(False)} of {len(seen)} processes do not see what the first '
            'one writes there. Use a folder on a file system that all of them share.'
        )
