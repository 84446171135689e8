"""Data sets of buckets on this machine: files are fetched once for each host, and kept up to a size."""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any

from bqat_jax.errors import UserError
from bqat_jax.storage import KeptArrays, Place, files_below, filesystem_of, is_of_bucket, wait_for_lock

logger = logging.getLogger(__name__)

DEFAULT = Path('~/.cache/bqat_jax')
# In the folder of a data set: it is whole; and a lock that processes share which read it.
COMPLETE, IN_USE = 'complete', 'in_use'
# Folders of data sets have such names, in a folder of their own: nothing else is counted or removed.
OWN, NAME = 'of_buckets', re.compile('[0-9a-f]{20}')
# Beside it: arrays of data sets that were decoded, and of weights that were converted.
ARRAYS = 'arrays'
# What a bucket calls the version of an object's content.
TAGS = ('ETag', 'etag', 'md5Hash', 'generation')
# Of folders that this process reads, so that no other process removes them; open as long as it lives.
_READ: dict[Path, IO[bytes]] = {}


@dataclasses.dataclass(frozen=True)
class Cache:
    """A local folder for files of buckets.

    Attributes:
        directory: of all data sets; made if it is not there.
        most_bytes: what it may hold; what was not used for longest is removed.
        is_wished: whether it is used for data that could be read directly too.
    """

    directory: Path = DEFAULT
    most_bytes: float = 200e9
    is_wished: bool = True

    @property
    def arrays(self) -> KeptArrays:
        """Where arrays are kept, in what data sets leave of the size."""
        root = self.directory.expanduser()
        try:
            held = _size_of(root / OWN) if (root / OWN).is_dir() else 0
        except OSError:  # another process is about to change it
            held = self.most_bytes
        return KeptArrays(root / ARRAYS, self.most_bytes - held)

    def fetch(self, source: Place, below: Place) -> Path:
        """Returns a local folder in which a data set lies as it does in a bucket.

        Processes of one host wait for each other: the first one fetches. A fetch that was broken off goes on. The
        folder belongs to the names and tags of the objects: where one changes, all are fetched anew.

        Args:
            source: the data set's folder in the bucket.
            below: the folder of data sets that it lies in.

        Raises:
            UserError: if there is no room for it, or the cache cannot be written.
        """
        files = files_below(source)
        sizes = {name: int(facts['size'] or 0) for name, facts in files.items()}
        inside = source.relative_to(below).as_posix()
        tags = {name: next((str(facts[tag]) for tag in TAGS if facts.get(tag)), '') for name, facts in files.items()}
        known = json.dumps([str(source), sorted(tags.items()), sorted(sizes.items())])
        root = self.directory.expanduser() / OWN
        own = root / hashlib.sha256(known.encode()).hexdigest()[:20]
        try:
            root.mkdir(parents=True, exist_ok=True)
            with wait_for_lock(root / '.lock'):
                if not (own / COMPLETE).is_file() or not _is_whole(own / inside, sizes):
                    self._make_room(root, sum(sizes.values()), own, source)
                    own.mkdir(exist_ok=True)
                    logger.info('Fetching %s (%.1f MB) into %s.', source, sum(sizes.values()) / 1e6, own)
                    _fetch_files(source, own / inside, sizes)
                    (own / COMPLETE).touch()
                os.utime(own / COMPLETE)
                _keep(own)
        except OSError as error:
            if is_of_bucket(error):
                raise
            raise UserError(
                f'{source} cannot be fetched into {root}: {error}. Make room, or give another folder '
                '(--config.data.cache_dir=DIR).'
            ) from error
        return own

    def _make_room(self, root: Path, needed: int, own: Path, source: Place) -> None:
        """Removes what was not used for longest, until so many bytes more are allowed."""
        if needed > self.most_bytes:
            raise UserError(
                f'{source} has {needed / 1e9:.1f} GB, and data.cache_gb={self.most_bytes / 1e9:g}. Give more, or read '
                'from gs:// directly, or from a local folder.'
            )
        others = [path for path in root.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and path != own]
        held = {path: _size_of(path) for path in others}
        # Arrays are made again sooner than data sets are fetched.
        KeptArrays(root.parent / ARRAYS, self.most_bytes).trim(max(0, self.most_bytes - needed - sum(held.values())))
        for path in sorted(others, key=_last_use):
            if sum(held.values()) + needed <= self.most_bytes:
                return
            if _remove_unused(path):
                del held[path]
        if sum(held.values()) + needed > self.most_bytes:
            raise UserError(
                f'{source} has {needed / 1e9:.1f} GB, and of data.cache_gb={self.most_bytes / 1e9:g} other runs read '
                f'{sum(held.values()) / 1e9:.1f} in {root}. Give more, or another folder (--config.data.cache_dir=DIR).'
            )


# The default: for data that cannot be read directly.
NOT_WISHED = Cache(is_wished=False)


def _is_whole(target: Path, sizes: dict[str, int]) -> bool:
    return all((target / name).is_file() and (target / name).stat().st_size == size for name, size in sizes.items())


def _fetch_files(source: Place, target: Path, sizes: dict[str, int]) -> None:
    system: Any = filesystem_of(source)
    for name, size in sizes.items():
        local = target / name
        if local.is_file() and local.stat().st_size == size:
            continue
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.with_name(f'{local.name}.part')
        system.get_file(f'{source}/{name}', str(part))
        if part.stat().st_size != size:
            raise UserError(f'{source}/{name} was fetched with {part.stat().st_size} of {size} bytes. Run it again.')
        part.replace(local)


def _keep(own: Path) -> None:
    """Lets no process remove a folder as long as this one lives."""
    if own not in _READ:
        _READ[own] = (own / IN_USE).open('wb')
        fcntl.flock(_READ[own], fcntl.LOCK_SH)


def _remove_unused(path: Path) -> bool:
    """Removes a folder that no process reads; returns whether it did."""
    with (path / IN_USE).open('ab') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)
    return True


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob('*') if file.is_file())


def _last_use(path: Path) -> float:
    """When a folder was last used; one that is not complete was never."""
    complete = path / COMPLETE
    return complete.stat().st_mtime if complete.is_file() else 0.0
