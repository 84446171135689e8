"""A local cache of data sets in buckets: files are fetched once per host, up to a size."""

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
# Files in the folder of a data set: a mark that it is complete, and a lock that its readers share.
COMPLETE, IN_USE = 'complete', 'in_use'
# The folder of all data sets, and the names of their folders; nothing else is counted or removed.
OWN, NAME = 'of_buckets', re.compile('[0-9a-f]{20}')
# The folder of decoded data sets and converted weights.
ARRAYS = 'arrays'
# Metadata of an object that identifies its content.
TAGS = ('ETag', 'etag', 'md5Hash', 'generation')
# Shared locks on folders that this process reads, until it ends; other processes do not remove them.
_READ: dict[Path, IO[bytes]] = {}


@dataclasses.dataclass(frozen=True)
class Cache:
    """A local folder for files of buckets.

    Attributes:
        directory: the folder, created if needed.
        most_bytes: size limit; the least recently used data sets are removed.
        is_wished: whether to cache data that can be read directly, too.
    """

    directory: Path = DEFAULT
    most_bytes: float = 200e9
    is_wished: bool = True

    @property
    def arrays(self) -> KeptArrays:
        """The cache of arrays, in the space that data sets leave."""
        root = self.directory.expanduser()
        try:
            held = _size_of(root / OWN) if (root / OWN).is_dir() else 0
        except OSError:  # another process is changing the folder
            held = self.most_bytes
        return KeptArrays(root / ARRAYS, self.most_bytes - held)

    def fetch(self, source: Place, below: Place) -> Path:
        """Returns a local folder with a copy of a data set in a bucket.

        Processes of one host wait for each other: the first one fetches. An interrupted fetch resumes. The folder is
        keyed by the names and tags of the objects: if one changes, all are fetched again.

        Args:
            source: the data set's folder in the bucket.
            below: the folder of data sets that contains it.

        Raises:
            UserError: if there is not enough space, or the cache cannot be written.
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
                f'{source} cannot be fetched into {root}: {error}. Free some space, or use another folder '
                '(--config.data.cache_dir=DIR).'
            ) from error
        return own

    def _make_room(self, root: Path, needed: int, own: Path, source: Place) -> None:
        """Removes the least recently used data sets until `needed` bytes fit."""
        if needed > self.most_bytes:
            raise UserError(
                f'{source} has {needed / 1e9:.1f} GB, and data.cache_gb={self.most_bytes / 1e9:g}. Use a larger value, '
                'or read from gs:// directly, or from a local folder.'
            )
        others = [path for path in root.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and path != own]
        held = {path: _size_of(path) for path in others}
        # Arrays go first: making them again is faster than fetching data sets.
        KeptArrays(root.parent / ARRAYS, self.most_bytes).trim(max(0, self.most_bytes - needed - sum(held.values())))
        for path in sorted(others, key=_last_use):
            if sum(held.values()) + needed <= self.most_bytes:
                return
            if _remove_unused(path):
                del held[path]
        if sum(held.values()) + needed > self.most_bytes:
            raise UserError(
                f'{source} has {needed / 1e9:.1f} GB, and of data.cache_gb={self.most_bytes / 1e9:g} other runs read '
                f'{sum(held.values()) / 1e9:.1f} in {root}. Use a larger value, or another folder '
                '(--config.data.cache_dir=DIR).'
            )


# The default, for data that cannot be read directly.
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
    """Locks a folder against removal until this process ends."""
    if own not in _READ:
        _READ[own] = (own / IN_USE).open('wb')
        fcntl.flock(_READ[own], fcntl.LOCK_SH)


def _remove_unused(path: Path) -> bool:
    """Removes a folder if no process reads it; returns whether it did."""
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
    """The time at which a folder was last used; 0 if it is incomplete."""
    complete = path / COMPLETE
    return complete.stat().st_mtime if complete.is_file() else 0.0
