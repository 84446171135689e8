"""What a run depends on beside its config."""

import jax
import pytest

import bqat_jax
from bqat_jax.errors import UserError
from bqat_jax.experiment.environment import NUMERICS, check_environment, digests, numerics, versions

OTHER = {
    'jax_enable_x64': True,
    'jax_default_prng_impl': 'rbg',
    'jax_default_matmul_precision': 'bfloat16',
    'jax_threefry_partitionable': not jax.config.jax_threefry_partitionable,
}


def recorded():
    return {'versions': versions(), 'numerics': numerics()}


def test_what_was_recorded_here_is_resumed_here(tmp_path):
    check_environment(recorded(), tmp_path, {'edition': 1})
    check_environment({}, tmp_path, {'edition': 1})  # a record that says nothing
    check_environment({'versions': {'bqat_jax': bqat_jax.__version__}}, tmp_path, {})
    check_environment({'data_set': {'edition': 1}}, tmp_path, {'edition': 1})
    check_environment({'data_set': {'edition': 1}}, tmp_path, {})  # a data set that says nothing


@pytest.mark.parametrize('name', NUMERICS)
def test_another_setting_of_jax_is_refused_by_name(name, tmp_path):
    before = getattr(jax.config, name)
    then = recorded()
    jax.config.update(name, OTHER[name])
    try:
        with pytest.raises(UserError, match=f'{name}: {before} -> {OTHER[name]}'):
            check_environment(then, tmp_path, {})
    finally:
        jax.config.update(name, before)


def test_a_workdir_of_a_version_whose_checkpoints_are_not_read_is_refused_by_version(tmp_path):
    with pytest.raises(UserError, match=r'was made by bqat_jax 0\.1\.3'):
        check_environment({'versions': {'bqat_jax': '0.1.3'}}, tmp_path, {})


def test_another_edition_of_the_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"another edition of the data set .*'edition': 1} -> {'edition': 2}"):
        check_environment({'data_set': {'edition': 1}}, tmp_path, {'edition': 2})


def test_files_are_told_apart_by_their_text(tmp_path):
    one, other = tmp_path / 'a.py', tmp_path / 'b.py'
    one.write_text('x = 1')
    other.write_text('x = 2')
    first, second = digests([one, other]).values()
    other.write_text('x = 1')
    assert first != second and set(digests([one, other]).values()) == {first}
