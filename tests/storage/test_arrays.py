"""Arrays that are kept: found again, never trusted if damaged, never the end of a run."""

import logging
import os
import shutil
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bqat_jax.storage import KeptArrays
from tests.conftest import ROOT

ARRAYS = {
    'image': np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    'label': np.array([1, 2], np.int32),
    'some.name/x': np.float32(3),
}


@pytest.fixture
def kept(tmp_path):
    return KeptArrays(tmp_path / 'to be' / 'made', 1e6)


class Made:
    """Makes arrays, and counts how often."""

    def __init__(self, arrays=ARRAYS):
        self.arrays, self.times = arrays, 0

    def __call__(self):
        self.times += 1
        return dict(self.arrays)


def same(ours, theirs=ARRAYS):
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], x) and ours[name].dtype == x.dtype and ours[name].shape == x.shape
        for name, x in theirs.items()
    )


def files(kept):
    return [path.name for path in kept.directory.iterdir()]


def test_arrays_are_made_once(kept):
    make = Made()
    assert same(kept.get('It', {'of': 1}, make)) and same(kept.get('It', {'of': 1}, make))
    assert make.times == 1
    kept.get('It', {'of': 2}, make)
    assert make.times == 2 and len(files(kept)) == 2


@pytest.mark.parametrize('damage', ['cut', 'changed', 'empty', 'pickle', 'foreign'])
def test_a_damaged_file_is_told_and_made_again(kept, damage, caplog, tmp_path):
    make = Made()
    kept.get('It', {'of': 1}, make)
    (path,) = kept.directory.iterdir()
    content = bytearray(path.read_bytes())
    if damage == 'cut':
        path.write_bytes(content[: len(content) // 2])
    elif damage == 'changed':
        content[content.index(ARRAYS['image'].tobytes()) + 5] ^= 1
        path.write_bytes(content)
    elif damage == 'empty':
        path.write_bytes(b'')
    elif damage == 'pickle':
        np.savez(path, facts=np.array([print], object))
    else:
        other = KeptArrays(tmp_path / 'other', 1e6)
        other.get('Other', {'of': 2}, Made({'image': np.zeros(3)}))
        (theirs,) = other.directory.iterdir()
        theirs.replace(path)
    with caplog.at_level(logging.WARNING, 'bqat_jax'):
        assert same(kept.get('It', {'of': 1}, make)) and make.times == 2
    assert 'It is made again' in caplog.text and str(path) in caplog.text
    assert same(kept.get('It', {'of': 1}, make)) and make.times == 2


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, caplog):
    (tmp_path / 'file').write_text('')
    kept, make = KeptArrays(tmp_path / 'file', 1e6), Made()
    with caplog.at_level(logging.WARNING, 'bqat_jax'):
        assert same(kept.get('It', {'of': 1}, make))
    assert 'It cannot be cached' in caplog.text


def test_a_full_disk_is_a_warning_and_leaves_nothing(kept, monkeypatch, caplog):
    def fill(file, **entries):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'savez', fill)
    with caplog.at_level(logging.WARNING, 'bqat_jax'):
        assert same(kept.get('It', {'of': 1}, Made()))
    assert 'No space left' in caplog.text and not files(kept)


def test_what_was_not_used_for_longest_goes(kept):
    small = KeptArrays(kept.directory, 2500)
    for number in range(2):
        small.get('It', {'of': number}, Made({'x': np.zeros(500, np.uint8)}))
    first, second = sorted(kept.directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    os.utime(second, (1, 1))
    (kept.directory / 'of others').write_text('')
    small.get('It', {'of': 2}, Made({'x': np.zeros(500, np.uint8)}))
    assert first.exists() and not second.exists() and len(files(kept)) == 3


def test_what_is_larger_than_the_folder_may_be_is_not_kept(kept, caplog):
    with caplog.at_level(logging.WARNING, 'bqat_jax'):
        KeptArrays(kept.directory, 10).get('It', {'of': 1}, Made())
    assert 'data.cache_gb' in caplog.text and not files(kept)


def test_a_disk_is_not_filled(kept, caplog, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=50))
    with caplog.at_level(logging.WARNING, 'bqat_jax'):
        assert same(kept.get('It', {'of': 1}, Made()))
    assert 'half of the free disk' in caplog.text and not files(kept)


def test_what_a_killed_process_left_goes_after_a_day(kept):
    kept.directory.mkdir(parents=True)
    old, new = kept.directory / '.a.tmp', kept.directory / '.b.tmp'
    old.touch()
    new.touch()
    os.utime(old, (1, time.time() - 2 * 86400))
    kept.get('It', {'of': 1}, Made())
    assert not old.exists() and new.exists()


def test_many_at_once_get_the_same(kept):
    """Threads that write and read one file, as processes do: names of unfinished files are nobody else's."""
    with ThreadPoolExecutor(8) as pool:
        assert all(same(read) for read in pool.map(lambda _: kept.get('It', {'of': 1}, Made()), range(40)))
    assert len(files(kept)) == 1


def test_two_processes_at_once_get_the_same(kept):
    program = (
        'import sys, pathlib, numpy as np; from bqat_jax.storage import KeptArrays; '
        "kept = KeptArrays(pathlib.Path(sys.argv[1]), 1e9); make = lambda: {'x': np.arange(2**20)}; "
        "print(sum(int(kept.get('It', {'of': number}, make)['x'].sum()) for number in range(5)))"
    )
    command = [sys.executable, '-c', program, str(kept.directory)]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    told = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert all(int(out) == 5 * sum(range(2**20)) and not errors for out, errors in told)
    assert len(files(kept)) == 5
