"""Data sets in buckets: read directly, kept in a cache, and what is told if they cannot be."""

import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from bqat_jax.data.caching import COMPLETE, Cache
from bqat_jax.data.pipeline import Split
from bqat_jax.data.sources import ImageOptions, load_images
from bqat_jax.errors import UserError
from bqat_jax.storage import filesystem_of, place, write_text

SIZE = 1000


@pytest.fixture(scope='module')
def expected(digits_dir):
    return load_images('digits', digits_dir)


@pytest.fixture
def prepared(server, bucket):
    """The digits, as they prepare themselves in a bucket."""
    load_images('digits', f'{server.scheme}://bucket/tfds')
    return f'{server.scheme}://bucket/tfds'


def assert_same_examples(images, expected):
    assert len(images.train) == len(expected.train) and len(images.test) == len(expected.test)
    for number in (0, 17, len(expected.train) - 1):
        np.testing.assert_array_equal(images.train[number]['image'], expected.train[number]['image'])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    return Cache(tmp_path / 'cache', 1e9)


def test_a_data_set_prepares_itself_and_is_read(prepared, expected, cache, server):
    assert_same_examples(load_images('digits', prepared), expected)
    assert cache.directory.exists() is False
    assert_same_examples(load_images('digits', prepared, ImageOptions(cache=cache)), expected)
    before = len(server.requests)
    assert_same_examples(load_images('digits', prepared, ImageOptions(cache=cache)), expected)
    read = [path for method, path in server.requests[before:] if 'array_record' in path and 'alt=media' in path]
    assert not read


def test_files_with_other_numbers_of_records_are_told(prepared, server, cache):
    system = fsspec.filesystem(server.scheme)
    folder = f'{prepared}/digits/1.0.0'
    info = system.cat_file(f'{folder}/dataset_info.json')
    try:
        system.pipe_file(f'{folder}/dataset_info.json', info.replace(b'"1437"', b'"1438"'))
        with pytest.raises(UserError, match=r'has 1437 records, and dataset_info\.json beside it says 1438'):
            load_images('digits', prepared, ImageOptions(cache=cache))
    finally:
        system.pipe_file(f'{folder}/dataset_info.json', info)


@pytest.mark.parametrize('fault', ['drop', 503, 403])
def test_data_that_cannot_be_reached_is_told_soon(prepared, server, cache, fault):
    """ArrayRecord alone waits for a quarter of an hour, and then says that there are no records."""
    server.fault = lambda method, path: fault if 'tfds' in path else None
    began = time.monotonic()
    with pytest.raises(UserError, match=r'storage\.patience|access is denied'):
        load_images('digits', prepared, ImageOptions(cache=cache))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize('server', ['gs'], indirect=True)
def test_a_refusal_while_examples_are_read_skips_none(bucket, server):
    images = load_images('digits', f'{server.scheme}://bucket/tfds')
    split = Split(images.train, None, skips_damaged=True)
    server.fault = lambda method, path: 403 if 'array_record' in path else None
    with pytest.raises(UserError, match='Its bucket denies access or does not respond'):
        list(split.training_batches(0, 8, 0, 2))
    assert not split.damaged


def test_a_data_set_that_is_not_there_is_told(bucket, server):
    with pytest.raises(UserError, match='is not prepared as ArrayRecord'):
        load_images('cifar10', f'{server.scheme}://bucket/nothing')


def fill(folder, name, size=SIZE):
    write_text(folder / name / 'a', 'x' * size)
    write_text(folder / name / 'inner' / 'b', name)


def test_the_cache_fetches_once_and_anew_where_an_object_changed(bucket, cache, server):
    fill(bucket, 'one')
    local = cache.fetch(bucket / 'one', bucket)
    assert (local / 'one' / 'a').read_text() == 'x' * SIZE and (local / 'one' / 'inner' / 'b').read_text() == 'one'
    before = len(server.requests)
    assert cache.fetch(bucket / 'one', bucket) == local
    assert len(server.requests) - before <= 2  # it is listed
    write_text(bucket / 'one' / 'a', 'y' * SIZE)
    other = cache.fetch(bucket / 'one', bucket)
    assert other != local and (other / 'one' / 'a').read_text() == 'y' * SIZE


def test_a_fetch_that_was_broken_off_goes_on(bucket, cache, server):
    fill(bucket, 'one')
    server.fault = lambda method, path: 403 if path.endswith('b') or '%2Fb' in path else None
    with pytest.raises(Exception, match=r'Forbidden|as the test says'):
        cache.fetch(bucket / 'one', bucket)
    assert not list(cache.directory.glob(f'*/*/{COMPLETE}'))
    server.fault = None
    server.requests.clear()
    local = cache.fetch(bucket / 'one', bucket)
    assert (local / 'one' / 'inner' / 'b').read_text() == 'one'
    assert not [path for _, path in server.requests if path.split('?')[0].endswith(('/a', '%2Fa'))]


def test_the_cache_removes_what_was_not_used_for_longest_and_no_process_reads(bucket, tmp_path, server):
    for name in ('one', 'two', 'three', 'four'):
        fill(bucket, name)
    cache = Cache(tmp_path, 2.5 * SIZE)
    # Another process fetches the first two, and has ended.
    command = (
        'import sys\nfrom bqat_jax.storage import place\nfrom bqat_jax.data.caching import Cache\n'
        'from pathlib import Path\n'
        'folder = place(sys.argv[1], "x")\n'
        'for name in ("one", "two"):\n    Cache(Path(sys.argv[2]), 1e9).fetch(folder / name, folder)\n'
    )
    subprocess.run([sys.executable, '-c', command, str(bucket), str(tmp_path)], check=True)
    kept = lambda: {path.name for path in tmp_path.glob('*/*/*')}  # noqa: E731
    assert {'one', 'two'} <= kept()
    cache.fetch(bucket / 'three', bucket)
    assert {'two', 'three'} <= kept() and 'one' not in kept()
    cache.fetch(bucket / 'four', bucket)
    assert {'three', 'four'} <= kept() and 'two' not in kept()
    with pytest.raises(UserError, match=r'data\.cache_gb=.* other runs read'):  # this process reads them
        cache.fetch(bucket / 'one', bucket)
    with pytest.raises(UserError, match=r'has 0\.0 GB, and data\.cache_gb'):
        Cache(tmp_path, SIZE / 2).fetch(bucket / 'two', bucket)


def test_the_cache_touches_nothing_of_others_and_mends_its_own(bucket, tmp_path):
    fill(bucket, 'one')
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'a').write_text('x' * 10 * SIZE)
    filesystem_of(bucket).pipe_file(f'{bucket}/one/inner/', b'')  # by which some programs mark folders
    cache = Cache(tmp_path, 2 * SIZE)
    local = cache.fetch(bucket / 'one', bucket)
    (local / 'one' / 'a').write_text('cut')
    assert cache.fetch(bucket / 'one', bucket) == local and (local / 'one' / 'a').read_text() == 'x' * SIZE
    assert (tmp_path / 'thesis' / 'a').exists()


def test_a_cache_that_cannot_be_written_is_told(bucket, tmp_path):
    fill(bucket, 'one')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot be fetched into .*data\.cache_dir=DIR'):
        Cache(tmp_path / 'file', 1e9).fetch(bucket / 'one', bucket)


def test_a_cache_is_a_local_folder(bucket, digits_dir):
    from bqat_jax.experiment.setup import _make_cache
    from tests.experiment.test_run import shortened

    config = shortened(digits_dir)
    config.data.cache_gb = 3.0
    assert _make_cache(config.data) == Cache(most_bytes=3e9, is_wished=False)
    config.data.cache_dir = str(bucket)
    with pytest.raises(UserError, match='must be a local folder'):
        _make_cache(config.data)
    assert place(digits_dir, 'data.dir')
