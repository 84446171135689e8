import errno
import fcntl
import json
import logging
from pathlib import Path

import pytest

from bqat_jax.errors import UserError
from bqat_jax.storage import held, place, read_json, write_json, write_text


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path):
    write_json(tmp_path / 'a.json', {'x': [1, 2.5, None]})
    write_json(tmp_path / 'a.json', {'x': 2})
    assert read_json(tmp_path / 'a.json') == {'x': 2}
    assert [path.name for path in tmp_path.iterdir()] == ['a.json']


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_text(tmp_path / 'a', 'old')
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / 'a', 'new \ud800')
    assert (tmp_path / 'a').read_text() == 'old'
    assert [path.name for path in tmp_path.iterdir()] == ['a']


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps({'x': 1})[:-2])
    with pytest.raises(UserError, match=r'a\.json is damaged'):
        read_json(tmp_path / 'a.json')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('[1]', 'holds a list'),
        ('3', 'holds a int'),
        ('{"b": 1}', "its entry 'a' is missing"),
        ('{"a": 1}', 'another type'),
    ],
)
def test_json_of_another_form_is_damaged(tmp_path, text, message):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(UserError, match=rf'a\.json is damaged: .*{message}'):
        read_json(tmp_path / 'a.json', a=str)
    (tmp_path / 'a.json').write_bytes(b'\xff\xfe')
    with pytest.raises(UserError, match='it is not JSON'):
        read_json(tmp_path / 'a.json')


def test_a_lock_is_held_once_and_given_back(tmp_path):
    with held(tmp_path, 60), pytest.raises(UserError, match='in use'), held(tmp_path, 60):
        pass
    with held(tmp_path, 60):
        pass


@pytest.mark.parametrize(
    'text', ['runs/a b', 'runs/lr=0.1', 'runs/{x}', 'runs/(1)', 'runs/日', '..', 'a:b', '#1', '%20']
)
def test_paths_become_absolute_and_stay_as_they_are_named(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place(text, '--workdir') == tmp_path / text


def test_the_home_folder_is_written_out(monkeypatch):
    monkeypatch.setenv('HOME', '/home/somebody')
    assert place('~/runs', '--workdir') == Path('/home/somebody/runs')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'empty'),
        ('  ', 'empty'),
        ('az://bucket/run', 'Use a local path, or one that begins with gs:// or s3://'),
        ('s3:/bucket/run', 'a missing slash. Write s3://bucket/run'),
        ('s3://', 'names no bucket'),
        ('s3:///run', 'names no bucket'),
        ('s3://bucket//run', 'must not be empty'),
        ('s3://bucket/../run', 'must not be empty'),
        ('s3://bucket/ru?n', 'has the character'),
        ('~nobody_of_that_name/x', 'nobody_of_that_name'),
        *((f'runs/a{character}b', 'has the character') for character in '*?[]\\\n\t\x01\x00'),
    ],
)
def test_paths_that_would_be_misread_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        place(text, '--workdir')


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog, number):
    def refuse(file, operation):
        raise OSError(number, 'not here')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    with caplog.at_level(logging.WARNING), held(tmp_path, 60):
        assert 'has no locks' in caplog.text


def test_an_error_of_the_disk_is_not_called_a_lock(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.EIO, 'disk')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    with pytest.raises(OSError, match='disk'), held(tmp_path, 60):
        pass
