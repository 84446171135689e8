"""Splits that are decoded whole, kept for later starts under all that their pixels depend on."""

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from bqat_jax.data import examples
from bqat_jax.data.pipeline import read_whole
from bqat_jax.data.sources import Subset
from bqat_jax.storage import KeptArrays, is_local

# What reads and decodes examples, beside this program.
PACKAGES = ('numpy', 'pillow', 'tensorflow-datasets', 'array_record')
# Beside the files of a split: what its features and its splits are.
DESCRIPTIONS = ('dataset_info.json', 'features.json')


def read_decoded(source: Subset, kept: KeptArrays | None) -> dict[str, np.ndarray]:
    """Returns what `read_whole` does, as an earlier start has kept it if there was one.

    Args:
        source: the split. One whose files do not lie on this machine is read.
        kept: where it is kept; None to read it.

    Raises:
        UserError: as `read_whole`.
    """
    facts = None if kept is None else describe_source(source)
    if kept is None or facts is None:
        return read_whole(source)
    return kept.get(f'The split {source.split!r} of {source.data_set}, decoded,', facts, lambda: read_whole(source))


def describe_source(source: Subset) -> dict[str, Any] | None:
    """Returns all that the decoded examples depend on, as JSON; None if it cannot be known.

    That is the data set with its version, the split's files with size and times of each, which records of them are
    read, what the examples are declared to be, and the packages and the module that decode them.
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
    """Size and times of a file: a new content has others, also where the time of writing was set back."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
