"""Small files, leases and errors in buckets, on servers that stand in for them."""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from bqat_jax.errors import UserError
from bqat_jax.storage import (
    Spool,
    check_reachable,
    fetched,
    held,
    local_copy,
    move_folder,
    place,
    read_json,
    write_json,
    write_text,
)
from bqat_jax.storage.leases import FOLDER, Lease
from bqat_jax.storage.orbax_stores import ORBAX, _retries, describe_store
from bqat_jax.storage.patience import Unavailable


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_small_files_are_written_read_moved_and_missing(bucket):
    assert not bucket.exists() and not bucket.is_dir()
    write_json(bucket / 'a.json', {'x': 1})
    write_json(bucket / 'a.json', {'x': 2})
    assert read_json(bucket / 'a.json') == {'x': 2}
    assert names(bucket) == ['a.json'] and bucket.is_dir() and (bucket / 'a.json').is_file()
    assert not (bucket / 'b.json').exists()
    write_text(bucket / 'old' / 'inner' / 'commit_success.txt', 'x')
    write_text(bucket / 'old' / 'b', 'y')
    move_folder(bucket / 'old', bucket / 'new')
    assert names(bucket / 'new') == ['b', 'inner'] and not (bucket / 'old').exists()
    with fetched(bucket / 'new' / 'b') as local:
        assert local.read_text() == 'y'
    assert local_copy(bucket / 'new' / 'b').read_text() == 'y'
    with pytest.raises(FileNotFoundError), fetched(bucket / 'none'):
        pass


def test_what_another_process_wrote_is_seen_at_once(bucket):
    write_text(bucket / 'a', '1')
    assert names(bucket) == ['a']
    write_text(bucket / 'b', '1')  # listings are not remembered
    (bucket / 'a').unlink()
    assert names(bucket) == ['b'] and not (bucket / 'a').exists()


def test_a_spool_sends_what_has_changed(bucket, server):
    spool = Spool(bucket)
    write_text(bucket / 'log', 'before\n')
    spool.fetch('log')
    spool.fetch('none')
    (spool.local / 'inner').mkdir()
    (spool.local / 'inner' / 'x').write_text('x')
    with (spool.local / 'log').open('a') as file:
        file.write('after\n')
    spool.send()
    before = len(server.requests)
    spool.send()
    assert len(server.requests) == before
    assert (bucket / 'log').read_text() == 'before\nafter\n' and (bucket / 'inner' / 'x').read_text() == 'x'
    spool.close()
    assert not spool.local.exists()


def test_a_folder_is_held_once_and_given_back(bucket):
    with held(bucket, 8) as hold:
        assert hold.is_held()
        hold.check()
        with pytest.raises(UserError, match='in use by another training process'), held(bucket, 8):
            pass
        assert hold.is_held()
    began = time.monotonic()
    with held(bucket, 60) as hold:
        assert hold.is_held() and time.monotonic() - began < 5  # it was given back, so nothing is waited for
        assert names(bucket / FOLDER) == [f'{hold.lease._number:06}']


def test_a_holder_that_stands_still_loses_and_a_dead_one_is_followed_at_once(bucket):
    still = Lease(bucket, 1)
    still._number = still._take()  # as when it is suspended: it does not renew
    with held(bucket, 1) as hold:
        assert hold.is_held() and not still.is_held()
        still._write()  # a renewal that was under way
        assert hold.is_held() and not still.is_held()
    dead = Lease(bucket, 1000)
    dead._content['started'] = '1'
    dead._take()
    began = time.monotonic()
    with held(bucket, 1000):
        assert time.monotonic() - began < 5


def test_a_lease_that_cannot_be_read_is_waited_for(bucket):
    for text in ('no JSON', '[]', '{}', '{"seconds": "x", "process": "y"}'):
        write_text(bucket / FOLDER / '000007', text)
        began = time.monotonic()
        with held(bucket, 1) as hold:
            assert hold.lease._number == 8 and time.monotonic() - began >= 1
        (bucket / FOLDER / '000008').unlink()


def test_a_holder_with_a_longer_lease_is_waited_for_as_long(bucket):
    slow = Lease(bucket, 3)
    slow._take()
    began = time.monotonic()
    with held(bucket, 1):
        assert time.monotonic() - began >= 3


def test_a_store_that_makes_what_is_there_is_refused(bucket, monkeypatch):
    system = fsspec.filesystem(str(bucket).partition(':')[0])
    pipe = system.pipe_file
    monkeypatch.setattr(system, 'pipe_file', lambda path, content, **_: pipe(path, content), raising=False)
    with pytest.raises(UserError, match='two runs could write into one folder'):
        check_reachable(bucket, '--workdir')


def test_of_many_takers_one_holds(bucket):
    """Numbers are made exclusively, and one that was removed is not taken for the newest."""
    stale = Lease(bucket, 0.5)
    stale._take()
    holders, refused = [], []

    def take():
        lease = Lease(bucket, 0.5)
        try:
            lease._number = lease._take()
            holders.append(lease)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) + len(refused) == 6
    assert [lease.is_held() for lease in holders].count(True) == 1


def test_a_lease_whose_answer_was_lost_is_ours(bucket, server):
    lost = []

    def lose(method, path):
        if method in ('PUT', 'POST') and not lost:
            lost.append(path)
            return 'lose'
        return None

    server.fault = lose
    with held(bucket, 5) as hold:
        assert lost and hold.is_held()


@pytest.mark.parametrize('fault', [503, 429, 500, 'drop', 'lose'])
def test_trouble_that_passes_is_waited_for(bucket, server, fault):
    write_text(bucket / 'a', '1')
    left = [1]

    def fail(method, path):
        left[0] -= 1
        return fault if left[0] >= 0 else None

    server.fault = fail
    write_text(bucket / 'a', '2')
    left[0] = 1
    assert (bucket / 'a').read_text() == '2'
    left[0] = 1
    assert (bucket / 'a').exists() and names(bucket) == ['a']


@pytest.mark.parametrize('fault', [503, 'drop'])
def test_trouble_that_stays_is_told_when_the_patience_is_over(bucket, server, fault):
    write_text(bucket / 'a', '1')
    server.fault = lambda method, path: fault
    for request in ((bucket / 'a').read_text, (bucket / 'a').exists, lambda: write_text(bucket / 'a', '2')):
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r'failed for . s \(storage\.patience=2\).*run the same command again'):
            request()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize('fault', [401, 403])
def test_a_refusal_is_told_at_once_and_is_not_a_file_that_is_not_there(bucket, server, fault):
    write_text(bucket / 'a', '1')
    server.fault = lambda method, path: fault
    server.requests.clear()
    for request in ((bucket / 'a').read_text, (bucket / 'a').exists, bucket.is_dir):
        with pytest.raises(Exception) as caught:
            request()
        assert not isinstance(caught.value, FileNotFoundError)
    assert len(server.requests) <= 9  # each once
    with pytest.raises(UserError, match=r'cannot be listed: access is denied .* Required'):
        check_reachable(bucket, '--workdir')


def test_a_bucket_that_is_not_there_is_told_and_not_made(bucket, server):
    other = place(f'{server.scheme}://nowhere/run', '--workdir')
    with pytest.raises(UserError, match=r"cannot be listed: there is no bucket 'nowhere'"):
        check_reachable(other, '--workdir')
    other.mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match='there is no bucket'):
        check_reachable(other, '--workdir')


@pytest.mark.parametrize(
    ('methods', 'message'),
    [(('PUT', 'POST'), 'no file can be written there'), (('DELETE',), 'cannot be deleted')],
)
def test_what_is_not_allowed_is_told(bucket, server, methods, message):
    if server.scheme == 's3' and methods == ('DELETE',):
        methods = ('DELETE', 'POST')  # of several objects by POST
    server.fault = lambda method, path: 403 if method in methods and 'list' not in path else None
    with pytest.raises(UserError, match=f'{message}: access is denied'):
        check_reachable(bucket, '--workdir')


def test_a_bucket_that_can_be_used_is_left_as_it_was(bucket, server):
    check_reachable(bucket, '--workdir')
    assert len(server.requests) <= 8
    assert not bucket.exists()


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_a_package_that_is_missing_is_named(scheme, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match='which is not installed'):
        place(f'{scheme}://bucket/run', '--workdir')


# SHA-256 of the source of Orbax's functions that are replaced, in the version that they were replaced for.
ORIGINALS = {
    '_use_gcs_driver': '33511474c1681e32',
    '_normalize_path': '57006a3147261e6d',
    'get_kvstore_for_gcs': '6c9be5a40f40c267',
}


def test_the_functions_that_are_replaced_are_those_that_were_read():
    """Orbax changed under the replacement: read it again, try s3://, and write down the new version."""
    found = {}
    for module, name in (
        ('orbax.checkpoint._src.serialization.tensorstore_utils', '_use_gcs_driver'),
        ('orbax.checkpoint._src.serialization.tensorstore_utils', '_normalize_path'),
        ('orbax.checkpoint._src.path.gcs_utils', 'get_kvstore_for_gcs'),
    ):
        spec = importlib.util.find_spec(module)  # the file, whatever was replaced in this process
        text = Path(spec.origin).read_text(encoding='utf-8')
        start = text.index(f'def {name}(')
        source = inspect.getblock(text[start:].splitlines(keepends=True))
        found[name] = hashlib.sha256(''.join(source).encode()).hexdigest()[:16]
    assert found == ORIGINALS
    assert importlib.metadata.version('orbax-checkpoint') == ORBAX


def test_stores_of_tensorstore_are_described(monkeypatch):
    for name in ('AWS_ENDPOINT_URL', 'AWS_REGION', 'AWS_DEFAULT_REGION', 'AWS_ENDPOINT_URL_S3', 'AWS_ACCESS_KEY_ID'):
        monkeypatch.delenv(name, raising=False)
    gs, s3 = describe_store('gs://b/x/y'), describe_store('s3://b/x/y/')
    assert (gs['driver'], gs['bucket'], gs['path']) == ('gcs', 'b', 'x/y')
    assert (s3['driver'], s3['bucket'], s3['path'], 'endpoint' in s3) == ('s3', 'b', 'x/y/', False)
    monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:1')
    assert describe_store('s3://b/x')['endpoint'] == 'http://127.0.0.1:1'
    assert describe_store('s3://b/x')['aws_region'] == 'us-east-1'


def test_orbax_repeats_requests_about_as_long_as_the_patience_lasts():
    for patience in (1, 10, 60, 600, 3600):
        pauses = [min(2.0**number, 32.0) for number in range(_retries(patience))]
        assert sum(pauses) <= max(patience, 1) < sum(pauses) + 33


def test_a_lease_says_who_holds_it(bucket):
    with held(bucket, 5):
        (path,) = (bucket / FOLDER).iterdir()
        content = json.loads(path.read_bytes())
        assert content['host'] and (sys.platform != 'linux' or content['process'])
