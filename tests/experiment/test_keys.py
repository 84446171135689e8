"""The table of keys: what it says holds for every key of it."""

import math

import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import base_config, check_values, leaves
from bqat_jax.experiment.keys import KEYS, in_words, is_within, markdown
from tests.conftest import ROOT

NUMBERS = [key for key in KEYS if key.kind in (int, float) or (key.kind is tuple and key.range)]


def changed(name, value):
    config = base_config().copy_and_resolve_references()  # takes values of any type, as a recipe's tuple does
    *sections, last = name.split('.')
    section = config
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[last] = value
    return config


def outside(key):
    """Numbers just outside of a key's range."""
    least, most = (float(end) for end in key.range[1:-1].split(','))
    unit = 1 if key.kind is int else 1e-3
    if math.isfinite(least):
        yield least if key.range[0] == '(' else least - unit
    if math.isfinite(most):
        yield most if key.range[-1] == ')' else most + unit


def test_the_page_is_current():
    assert (ROOT / 'docs' / 'configuration.md').read_text(encoding='utf-8') == markdown()


def test_the_base_config_has_every_key_and_no_other_and_passes():
    assert sorted(name for name, _ in leaves(base_config())) == sorted(key.name for key in KEYS)
    check_values(base_config())


def test_every_number_has_a_range():
    assert [key.name for key in KEYS if key.kind in (int, float) and not key.range] == []


@pytest.mark.parametrize('key', NUMBERS, ids=lambda key: key.name)
def test_numbers_out_of_range_are_refused_by_name(key):
    values = [math.nan, math.inf, -math.inf, *outside(key)]
    for value in values:
        number = int(value) if key.kind is int and math.isfinite(value) else value
        with pytest.raises(UserError, match=rf'^{key.name}='):
            check_values(changed(key.name, (number,) if key.kind is tuple else number))


@pytest.mark.parametrize('key', KEYS, ids=lambda key: key.name)
def test_values_of_another_type_are_refused_by_name(key):
    wrong = {bool: [1, 'yes'], int: [True, 'one', 1.5], float: ['one'], str: [3], tuple: ['(1, 2)', 3]}[key.kind]
    if key.kind is tuple and key.range:
        wrong = [*wrong, ('a', 'b')]
    for value in wrong if key.may_be_unset else [*wrong, None]:
        with pytest.raises(UserError, match=rf'^{key.name}='):
            check_values(changed(key.name, value))


@pytest.mark.parametrize('key', [key for key in KEYS if key.may_be_unset], ids=lambda key: key.name)
def test_keys_that_may_be_unset_may_be(key):
    check_values(changed(key.name, None))


def test_a_key_that_nothing_reads_and_one_that_is_missing_are_told():
    config = base_config()
    config.optimizer.learningrate = 0.1
    with pytest.raises(UserError, match=r"optimizer.learningrate.*Did you mean 'optimizer.learning_rate'"):
        check_values(config)
    for section, key in (('train', 'batch_size'), ('network', 'name')):
        config = base_config()
        del config[section][key]
        with pytest.raises(UserError, match=rf'no {section}\.{key}'):
            check_values(config)


def test_options_of_networks_are_checked_too():
    for name, value in (('width_multiplier', math.nan), ('patch_size', 0), ('unknown', math.inf)):
        config = base_config()
        config.network[name] = value
        with pytest.raises(UserError, match=rf'^network.{name}='):
            check_values(config)


def test_the_last_seed_is_one_too():
    config = base_config()
    config.seed, config.train.replicas = 2**32 - 2, 2
    check_values(config)
    config.train.replicas = 3
    with pytest.raises(UserError, match=r'train\.replicas=3: the last seed is 4294967296'):
        check_values(config)


@pytest.mark.parametrize(
    ('interval', 'inside', 'beyond', 'words'),
    [
        ('[0, 1)', (0, 0.5), (-1e-9, 1), 'at least 0 and less than 1'),
        ('[0, inf)', (0, 3e38), (4e38, 1e300), 'at least 0 and finite'),
        ('(0, inf)', (1e-30, 1e30), (0, math.inf, math.nan), 'more than 0 and finite'),
        ('[1, 32]', (1, 32), (0, 33), 'at least 1 and at most 32'),
        ('(-inf, inf)', (-1e30, 0), (-1e300, math.inf, -math.inf, math.nan), 'finite'),
        ('', (3,), (math.nan,), 'finite'),
    ],
)
def test_intervals(interval, inside, beyond, words):
    assert all(is_within(value, interval) for value in inside)
    assert not any(is_within(value, interval) for value in beyond)
    assert in_words(interval) == words
