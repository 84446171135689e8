"""Small files, written so that a reader never sees half of one, and locks."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bqat_jax.distributed.processes import is_first, wait_for_all
from bqat_jax.errors import UserError

# What flock raises on file systems that have no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: a reader, or a kill, finds the old content or the new, never half of it."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, atomically."""
    write_bytes(path, text.encode('utf-8'))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + '\n')


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        UserError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(f'{path} is damaged: it is not JSON ({error}). Take another --workdir.') from error


def write_once(path: Path, value: Any) -> None:
    """Writes JSON by the first of several processes; in all of them the file is there afterwards."""
    if is_first():
        write_json(path, value)
    wait_for_all(f'written {path}')


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a directory for one training process; the lock goes with the process, however it ends.

    Raises:
        UserError: if another process holds it.
    """
    with (directory / '.lock').open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f'{directory} is in use by another training process. Wait for it, or take another --workdir.'
            ) from error
        yield


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Waits for a lock file and holds it; the lock goes with the process, however it ends.

    Where the file system has no locks, nothing is waited for.

    Args:
        path: of the lock file, which is made if it is not there, and stays.

    Raises:
        OSError: if the file cannot be made.
    """
    with path.open('a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
