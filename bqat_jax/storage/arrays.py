"""Arrays that took long to make, kept on this machine for later starts; what cannot be kept is made again."""

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

# Of these files; another one has other names.
FORMAT = 1
# Entries of a file: a JSON text of what the arrays are, and each of them.
FACTS, ARRAY = 'facts', 'array/'
# How the names of files end that are being written; those that are a day old never will be.
UNFINISHED, DAY = '.tmp', 86400.0


@dataclasses.dataclass(frozen=True)
class KeptArrays:
    """A local folder of arrays, a file for all that were made together.

    A file is named after what it was made from, and holds that and a checksum of every array (those of NumPy's .npz).
    It appears at once and whole, so that processes need not wait for each other: the last one's file stays, and all
    are the same.

    Attributes:
        directory: made if it is not there. Files of other names in it are let alone.
        most_bytes: what it may hold; what was not used for longest is removed. Of its disk half of what is free stays
            so.
    """

    directory: Path
    most_bytes: float

    def get(
        self, what: str, facts: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Returns arrays as they are kept; made, and kept, if they are not.

        A folder that cannot be read or written, and a file that is damaged, give a warning.

        Args:
            what: they are, for messages: 'The split train, decoded'.
            facts: all that the arrays depend on, as JSON.
            make: makes them, of numbers and booleans.
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
            logger.warning('%s cannot be kept in %s: %s. The next start makes it again.', what, self.directory, error)
        return arrays

    def _read(self, what: str, path: Path, text: str) -> dict[str, np.ndarray] | None:
        try:
            # NumPy leaves a file open that it opens itself and cannot read.
            with path.open('rb') as stream, np.load(stream, allow_pickle=False) as file:
                if file[FACTS].tobytes() != text.encode():
                    raise ValueError('it was made from something else')
                arrays = {name.removeprefix(ARRAY): file[name] for name in file.files if name != FACTS}
        except FileNotFoundError:
            return None
        except Exception as error:  # NumPy and zipfile raise many kinds for what is cut, changed or none of ours
            logger.warning('%s cannot be read from %s, where it is kept: %s. It is made again.', what, path, error)
            return None
        with contextlib.suppress(OSError):  # in a folder of somebody else's it may not be said when a file was used
            os.utime(path)
        return arrays

    def _write(self, what: str, path: Path, text: str, arrays: Mapping[str, np.ndarray]) -> None:
        needed = sum(x.nbytes for x in arrays.values())
        self.directory.mkdir(parents=True, exist_ok=True)
        # The disk is that of checkpoints too, perhaps.
        room = max(0, min(self.most_bytes, shutil.disk_usage(self.directory).free / 2))
        if needed > room:
            logger.warning(
                '%s is not kept: it has %.3g GB, and %s has room for %.3g, by data.cache_gb and half of what is free.',
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
        """Removes what was not used for longest, until the folder holds no more than so many bytes."""
        files = {path: facts for path in self.directory.glob('*.npz') if (facts := _facts(path))}
        held = sum(facts.st_size for facts in files.values())
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if held <= most_bytes:
                break
            path.unlink(missing_ok=True)
            held -= files[path].st_size
        for path in self.directory.glob(f'.*{UNFINISHED}'):  # of processes that were killed
            if (facts := _facts(path)) and facts.st_mtime < time.time() - DAY:
                path.unlink(missing_ok=True)


def _facts(path: Path) -> os.stat_result | None:
    """Size and times of a file; None if another process has removed it."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
