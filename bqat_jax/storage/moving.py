"""Files on their way between this machine and buckets."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bqat_jax.storage.places import Place, filesystem_of

# Orbax counts a checkpoint in a bucket only if it has this file; it is written last.
COMMIT_FILE = 'commit_success.txt'


class Spool:
    """A folder in which files grow: a local one is used as it is; for one in a bucket they grow here and are sent.

    Attributes:
        directory: where the files belong.
        local: where they are written.
    """

    def __init__(self, directory: Place):
        """Takes the folder, which is made if it is local."""
        self.directory = directory
        self._is_local = isinstance(directory, Path)
        self.local = directory if isinstance(directory, Path) else Path(tempfile.mkdtemp(prefix='bqat_jax_spool_'))
        self._sent: dict[Path, tuple[int, int]] = {}
        self.local.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> None:
        """Brings a file here, if there is one, to go on with it."""
        if not self._is_local:
            path = self.directory / name
            with contextlib.suppress(FileNotFoundError):
                filesystem_of(path).get_file(str(path), str(self.local / name))

    def send(self) -> None:
        """Sends every file that has changed since the last call, whole."""
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
        """Removes what was written here for a bucket; what was not sent is lost."""
        if not self._is_local:
            shutil.rmtree(self.local, ignore_errors=True)


def upload(file: Path, target: Place) -> None:
    """Copies a local file into a bucket, whole or not at all."""
    filesystem_of(target).put_file(str(file), str(target))


@contextlib.contextmanager
def fetched(path: Place) -> Iterator[Path]:
    """Within it a file can be read at the local path that it gives; that of a local file is its own.

    Raises:
        FileNotFoundError: if there is none in the bucket.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix='bqat_jax_') as folder:
        local = Path(folder) / path.name
        filesystem_of(path).get_file(str(path), str(local))
        yield local


def files_below(directory: Place) -> dict[str, dict[str, Any]]:
    """Returns what a bucket says of every object below a folder, by the rest of its name."""
    system = filesystem_of(directory)
    found: Any = system.find(str(directory), detail=True)
    prefix = str(directory).partition('://')[2].rstrip('/') + '/'
    # Names that end with a slash are empty objects by which some programs mark folders.
    return {
        name.removeprefix(prefix): facts
        for name, facts in found.items()
        if name.startswith(prefix) and not name.endswith('/') and facts['type'] != 'directory'
    }


def move_folder(source: Place, target: Place) -> None:
    """Moves a folder; in a bucket all objects are copied before the first is removed.

    A move that is broken off leaves the folder as it was, or, when the copy is whole, a part that does not count as a
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
    """Returns a local path of a file that is read as long as this process lives; that of a local file is its own.

    Raises:
        FileNotFoundError: if there is none in the bucket.
    """
    if isinstance(path, Path):
        return path
    folder = Path(tempfile.mkdtemp(prefix='bqat_jax_'))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    filesystem_of(path).get_file(str(path), str(folder / path.name))
    return folder / path.name
