"""The command line, read against the recipe that it names."""

import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.command_line import load_recipe, read_command_line, unset
from bqat_jax.experiment.configuration import base_config
from tests.conftest import ROOT

DIGITS = ROOT / 'configs' / 'digits.py'


def read(*flags):
    return read_command_line(['main.py', *flags], DIGITS)


def test_the_recipe_is_taken_from_the_arguments_with_its_own():
    cifar = ROOT / 'configs' / 'cifar10_resnet20.py'
    for flags in ((f'--config={cifar}:bits=3',), ('--config', f'{cifar}:bits=3'), (f'-config={cifar}:bits=3',)):
        given = read('--config.seed=3', *flags, '--mode=train')
        assert given.recipe == cifar and given.config.quant.weights.bits == 3
        assert given.argv == ['main.py', '--config.seed=3', '--mode=train'] and given.unset == ()
    assert read().recipe == DIGITS


def test_none_unsets_what_may_be_unset_and_the_last_counts():
    given = read('--config.train.steps=5', '--config.train.steps=None', '--config.data.dir', 'None')
    assert given.argv == ['main.py'] and given.unset == ('train.steps', 'data.dir')
    given = read('--config.train.steps=None', '--config.train.steps', '5')
    assert given.argv == ['main.py', '--config.train.steps=5'] and given.unset == ()
    given = read('--config.data.name=None')  # a name, since it cannot be unset
    assert given.argv == ['main.py', '--config.data.name=None'] and given.unset == ()


def test_keys_are_unset():
    config = base_config()
    config.train.steps, config.data.dir = 5, 'somewhere'
    unset(config, ('train.steps', 'data.dir'))
    assert config.train.steps is None and config.data.dir is None


def test_flags_without_a_value_take_nothing_away():
    given = read('--config.data.flip', '--noconfig.data.on_device', '--config.data.name', 'digits', '--mode=summary')
    expected = ['--config.data.flip', '--noconfig.data.on_device', '--config.data.name=digits', '--mode=summary']
    assert given.argv == ['main.py', *expected]


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--config.optim.lr=1', "no 'optim'. Did you mean 'optimizer'"),
        ('--config.quantization.x=2', "no 'quantization'. Did you mean 'quant'"),
        ('--config.optimiser.momentum=0', "Did you mean 'optimizer'"),
        ('--config.train.stps=3', "no 'stps' in config.train. Did you mean 'steps'"),
        ('--config.learning_rate=1', "Did you mean 'optimizer.learning_rate'"),
        ('--config.mesh.least_elements=3', "Did you mean 'min_shard_elements'"),
        ('--config.data.name.x=3', 'data.name is a value and has no keys'),
        ('--config.mesh.q=3', 'docs/configuration.md lists all keys'),
        ('--config.seed.x.y=3', 'seed is a value and has no keys'),
        ('--config.train=3', 'is a section of the config. Set its keys one by one: batch_norm_groups'),
        ('--config.=3', 'docs/configuration.md lists all keys'),
        ('--noconfig.data.flipp', "Did you mean 'flip'"),
        ('--config=', 'there is no file'),
        ('--config=nothing.py', "there is no file 'nothing.py'"),
        ('--config=configs', 'there is no file'),
    ],
)
def test_what_the_config_does_not_have_is_told_with_what_is_like_it(flag, message):
    with pytest.raises(UserError, match=message.replace('.', r'\.')):
        read(flag)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def get_config(:', 'failed: SyntaxError'),
        ('import nothing_of_that_name', 'failed: ModuleNotFoundError'),
        ('x = 1', 'no function get_config'),
        ('def get_config(argument=None):\n    return {}', 'returned a dict, not a ConfigDict'),
        ('def get_config(argument=None):\n    return 1 / 0', 'failed: ZeroDivisionError'),
        ('def get_config():\n    pass', 'takes 0 positional arguments'),
    ],
)
def test_a_recipe_that_fails_is_told(tmp_path, text, message):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(f'{path}:bits=2')
    (tmp_path / 'mine.txt').write_text('')
    with pytest.raises(UserError, match=r'must end in \.py'):
        load_recipe(str(tmp_path / 'mine.txt'))
