import json

import pytest

from bqat_jax.errors import UserError
from bqat_jax.storage import locked, read_json, write_json, write_text


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


def test_a_lock_is_held_once_and_given_back(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match='in use'), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
