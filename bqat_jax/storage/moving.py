"""Transfers of files between this machine and buckets."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bqat_jax.storage.places import Place, filesystem_of

# Orbax accepts a checkpoint in a bucket only with this file, which is written last.
COMMIT_FILE = 'commit_success.txt'


class Spool:
    """A folder for files that are appended to; files for a bucket are written locally and sent.

    Attributes:
        directory: destination of the files.
        local: where they are written; equals `directory` if that is local.
    """

    def __init__(self, directory: Place):
        """Takes the folder, which is created if it is local."""
        self.directory = directory
        self._is_local = isinstance(directory, Path)
        self.local = directory if isinstance(directory, Path) else Path(tempfile.mkdtemp(prefix='bqat_jax_spool_'))
        self._sent: dict[Path, tuple[int, int]] = {}
        self.local.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> None:
        """Downloads a file, if it exists, to append to it."""
        if not self._is_local:
            path = self.directory / name
            with contextlib.suppress(FileNotFoundError):
                filesystem_of(path).get_file(str(path), str(self.local / name))

    def send(self) -> None:
        """Sends every file that has changed since the last call."""
        if self._is_local:
            return
        for file in sorted(self.local.rglob('*')):
            if file.is_file():
                state = file.stat()
                stamp = (state.st_size, state.st_mtime_ns)
                if self._sent.get(file) != stamp:
                    upload(file, self.directory / file.relative_to(self.local).as_posix())
                    self._sent[file] = stamp

    def close(self) -> None:
        """Removes local files of a bucket; files that were not sent are lost."""
        if not self._is_local:
            shutil.rmtree(self.local, ignore_errors=True)


def upload(file: Path, target: Place) -> None:
    """Copies a local file into a bucket atomically."""
    filesystem_of(target).put_file(str(file), str(target))


@contextlib.contextmanager
def fetched(path: Place) -> Iterator[Path]:
    """Yields a local path of a file: its own path, or that of a temporary copy from a bucket.

    Raises:
        FileNotFoundError: if the bucket does not have the file.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix='bqat_jax_') as folder:
        local = Path(folder) / path.name
        filesystem_of(path).get_file(str(path), str(local))
        yield local


def files_below(directory: Place) -> dict[str, dict[str, Any]]:
    """Returns a bucket's metadata of every object below a folder, by name relative to the folder."""
    system = filesystem_of(directory)
    objects: Any = system.find(str(directory), detail=True)
    prefix = str(directory).partition('://')[2].rstrip('/') + '/'
    # Some programs mark folders with empty objects whose names end with a slash.
    return {
        name.removeprefix(prefix): facts
        for name, facts in objects.items()
        if name.startswith(prefix) and not name.endswith('/') and facts['type'] != 'directory'
    }


def move_folder(source: Place, target: Place) -> None:
    """Moves a folder; in a bucket all objects are copied before the first is removed.

    An interrupted move leaves the folder as it was, or, once the copy is complete, a part that is not a valid
    checkpoint.
    """
    if isinstance(source, Path):
        Path(target).parent.mkdir(exist_ok=True)
        source.rename(Path(target))
        return
    system = filesystem_of(source)
    names = sorted(files_below(source), key=lambda name: (name != COMMIT_FILE, name))
    for name in reversed(names):
        system.copy(f'{source}/{name}', f'{target}/{name}')
    for name in names:
        system.rm_file(f'{source}/{name}')


@functools.cache
def local_copy(path: Place) -> Path:
    """Returns a local path of a file: its own path, or that of a copy from a bucket that lasts until this process ends.

    Raises:
        FileNotFoundError: if the bucket does not have the file.
    """
    if isinstance(path, Path):
        return path
    folder = Path(tempfile.mkdtemp(prefix='bqat_jax_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    filesystem_of(path).get_file(str(path), str(folder / path.name))
    return folder / path.name
