"""Paths that a user gives, small files written so that a reader never sees half of one, and locks."""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bqat_jax.distributed.processes import is_first, wait_for_all
from bqat_jax.errors import UserError

logger = logging.getLogger(__name__)

# What the libraries below would misread in a path, and why.
MISREAD = {
    '*': 'file names are matched with it as a pattern',
    '?': 'file names are matched with it as a pattern',
    '[': 'file names are matched with it as a pattern',
    ']': 'file names are matched with it as a pattern',
    '\\': 'TensorStore takes it for a separator',
}
LOCK = '.lock'
# What a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def place(text: str | Path, name: str) -> Path:
    """Returns a path that a user gave, absolute, with `~` as the home folder.

    Args:
        text: the path.
        name: of the flag or key that gave it, for messages.

    Raises:
        UserError: for a path that is empty, is no local path, or has a character that a library would misread.
    """
    given = f'{name}={str(text)!r}'
    if not str(text).strip():
        raise UserError(f'{given}: the path is empty. Give the path of a file or folder.')
    scheme, separator, _ = str(text).partition('://')
    if separator:
        raise UserError(
            f'{given}: paths that begin with {scheme}:// are not supported. Give a local path, or one of a file system '
            'that is mounted here.'
        )
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name of a user that there is not
        raise UserError(f'{given}: {error}. Write the folder out.') from error
    for character in str(path):
        if character in MISREAD or not character.isprintable():
            why = MISREAD.get(character, 'it cannot be seen')
            raise UserError(f'{given}: the path {str(path)!r} has the character {character!r}, and {why}. Rename it.')
    return path


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


def read_json(path: Path, **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Args:
        path: of the file.
        **fields: the entries that it must have, with their types.

    Raises:
        UserError: if it is not JSON, or not such an object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise damaged(path, f'it is not JSON ({error})') from error
    if not isinstance(content, dict):
        raise damaged(path, f'it holds a {type(content).__name__}, and no object')
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise damaged(path, f'its entry {name!r} is missing, or of another type')
    return content


def damaged(path: Path, why: str) -> UserError:
    """Returns the error for a file of a run's that is not as it was written."""
    return UserError(f'{path} is damaged: {why}. Put it back as it was, or take another --workdir.')


def write_once(path: Path, value: Any) -> None:
    """Writes JSON by the first of several processes; in all of them the file is there afterwards."""
    if is_first():
        write_json(path, value)
    wait_for_all(f'written {path}')


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a directory for one training process; the lock goes with the process, however it ends.

    On a file system without locks it warns, and holds nothing.

    Raises:
        UserError: if another process holds it.
    """
    with (directory / LOCK).open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f'{directory} is in use by another training process. Wait for it, or take another --workdir.'
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                'The file system of %s has no locks (%s): make sure that no other process trains there.',
                directory,
                error.strerror,
            )
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
