"""A cache of decoded splits, keyed by everything that their pixels depend on."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from bqat_jax.data import examples
from bqat_jax.data.pipeline import read_whole
from bqat_jax.data.sources import Subset
from bqat_jax.storage import KeptArrays, is_local

# Packages that read and decode examples.
PACKAGES = ('numpy', 'pillow', 'tensorflow-datasets', 'array_record')
# Files beside a split's, which describe its features and splits.
DESCRIPTIONS = ('dataset_info.json', 'features.json')


def read_decoded(source: Subset, kept: KeptArrays | None) -> dict[str, np.ndarray]:
    """Reads a split as `read_whole` does, through a cache.

    Args:
        source: the split; it is cached only if its files are on this machine.
        kept: the cache; None for no cache.

    Raises:
        UserError: for the reasons of `read_whole`.
    """
    facts = None if kept is None else describe_source(source)
    if kept is None or facts is None:
        return read_whole(source)
    return kept.get(f'The split {source.split!r} of {source.data_set}, decoded,', facts, lambda: read_whole(source))


def describe_source(source: Subset) -> dict[str, Any] | None:
    """Returns everything that the decoded examples depend on, as JSON; None if it cannot be determined.

    This is the data set with its version, the split's files with their sizes and times, the records that are read, the
    declared format of examples, and the packages and the module that decode them.
    """
    paths = [Path(name) for name, _, _ in source.files]
    if not source.data_set or not paths or not all(is_local(name) for name, _, _ in source.files):
        return None
    try:
        files = {str(path): _stamp(path) for path in paths}
        described = {name: _stamp(paths[0].parent / name) for name in DESCRIPTIONS}
    except OSError:
        return None
    return {
        'data_set': source.data_set,
        'split': source.split,
        'parts': [list(part) for part in source.files],
        'files': files,
        'descriptions': described,
        'examples': hashlib.sha256(np.asarray(source.positions, np.int64).tobytes()).hexdigest(),
        'declared': repr(source.format),
        'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
        'program': hashlib.sha256(Path(examples.__file__).read_bytes()).hexdigest(),
    }


def _stamp(path: Path) -> list[int]:
    """Size and times of a file; the change time reveals new content even if the modification time was set back."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
