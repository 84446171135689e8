"""A local cache of arrays that take long to compute; arrays that cannot be cached are computed again."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# Version of the files; it is part of their names.
FORMAT = 1
# Entries of a file: a JSON text of the facts, and the arrays.
FACTS, ARRAY = 'facts', 'array/'
# Suffix of unfinished files, and the age in seconds at which they are removed.
UNFINISHED, DAY = '.tmp', 86400.0


@dataclasses.dataclass(frozen=True)
class KeptArrays:
    """A local folder of arrays, with one file per set of arrays.

    A file is named after a hash of its facts, and holds the facts and checksums of the arrays (those of NumPy's .npz).
    It is written atomically, so that processes need not wait for each other: the last file stays, and all are equal.

    Attributes:
        directory: the folder, created if needed. Other files in it are left alone.
        most_bytes: size limit; the least recently used files are removed. Half of the free disk space is never used.
    """

    directory: Path
    most_bytes: float

    def get(
        self, what: str, facts: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Returns cached arrays; makes and caches them if they are missing.

        A folder that cannot be read or written, or a damaged file, is logged as a warning.

        Args:
            what: name of the arrays for messages, such as 'The split train, decoded'.
            facts: everything that the arrays depend on, as JSON.
            make: makes the arrays, of numbers and booleans.
        """
        text = json.dumps({'format': FORMAT, **facts}, sort_keys=True)
        path = self.directory / f'{hashlib.sha256(text.encode()).hexdigest()[:40]}.npz'
        kept = self._read(what, path, text)
        if kept is not None:
            return kept
        arrays = make()
        try:
            self._write(what, path, text, arrays)
        except OSError as error:
            logger.warning('%s cannot be cached in %s: %s. The next start makes it again.', what, self.directory, error)
        return arrays

    def _read(self, what: str, path: Path, text: str) -> dict[str, np.ndarray] | None:
        try:
            # NumPy does not close a file that it opens and cannot read.
            with path.open('rb') as stream, np.load(stream, allow_pickle=False) as file:
                if file[FACTS].tobytes() != text.encode():
                    raise ValueError('it has other facts')
                arrays = {name.removeprefix(ARRAY): file[name] for name in file.files if name != FACTS}
        except FileNotFoundError:
            return None
        except Exception as error:  # NumPy and zipfile raise many kinds for truncated, changed or foreign files
            logger.warning('%s cannot be read from the cache %s: %s. It is made again.', what, path, error)
            return None
        with contextlib.suppress(OSError):  # marks the file as used; not allowed in another user's folder
            os.utime(path)
        return arrays

    def _write(self, what: str, path: Path, text: str, arrays: Mapping[str, np.ndarray]) -> None:
        needed = sum(x.nbytes for x in arrays.values())
        self.directory.mkdir(parents=True, exist_ok=True)
        # Half of the free disk is left to checkpoints.
        room = max(0, min(self.most_bytes, shutil.disk_usage(self.directory).free / 2))
        if needed > room:
            logger.warning(
                '%s is not cached: it has %.3g GB, and %s may hold %.3g, by data.cache_gb and half of the free disk.',
                *(what, needed / 1e9, self.directory, room / 1e9),
            )
            return
        self.trim(self.most_bytes - needed)
        entries = {FACTS: np.frombuffer(text.encode(), np.uint8), **{f'{ARRAY}{name}': x for name, x in arrays.items()}}
        temporary = path.with_name(f'.{path.stem}.{uuid.uuid4().hex}{UNFINISHED}')
        try:
            with temporary.open('xb') as file:
                np.savez(file, allow_pickle=False, **entries)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def trim(self, most_bytes: float) -> None:
        """Removes the least recently used files until the folder holds at most `most_bytes` bytes."""
        files = {path: facts for path in self.directory.glob('*.npz') if (facts := _facts(path))}
        held = sum(facts.st_size for facts in files.values())
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if held <= most_bytes:
                break
            path.unlink(missing_ok=True)
            held -= files[path].st_size
        for path in self.directory.glob(f'.*{UNFINISHED}'):  # left by killed processes
            if (facts := _facts(path)) and facts.st_mtime < time.time() - DAY:
                path.unlink(missing_ok=True)


def _facts(path: Path) -> os.stat_result | None:
    """Size and times of a file; None if another process has removed it."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
