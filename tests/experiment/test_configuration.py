import importlib.util
import json

import ml_collections
import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import (
    base_config,
    changed_keys,
    check_resumable,
    duration,
    parse_argument,
    to_plain,
)
from tests.conftest import ROOT

RECIPES = sorted(path for path in (ROOT / 'configs').glob('*.py') if path.stem != 'common')


def load_recipe(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(config, prefix=''):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from keys_of(value, f'{prefix}{key}.')
        else:
            yield prefix + key


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_recipes_use_no_key_but_the_known_and_take_arguments(path):
    recipe = load_recipe(path)
    keys, known = (
        {key for key in keys_of(config) if not key.startswith('network.')}  # test_configs.py looks at these
        for config in (recipe.get_config(), base_config())
    )
    assert keys == known
    config = recipe.get_config('bits=3,plan=none')
    assert config.quant.weights.bits == 3
    assert config.quant.activations.bits == (8 if config.task == 'language_model' else 3)
    assert config.replacement.plan == 'none'
    assert 'Command: python main.py' in recipe.__doc__
    with pytest.raises(UserError, match="Did you mean 'bits'"):
        recipe.get_config('bit=3')


def test_arguments_are_typed():
    values = parse_argument('bits=4,rate=1e-3,flag=true,plan=x', bits=2, rate=0.1, flag=False, plan='y', other=7)
    assert (values.bits, values.rate, values.flag, values.plan, values.other) == (4, 1e-3, True, 'x', 7)
    assert parse_argument(None, bits=2).bits == 2
    assert parse_argument('', bits=2).bits == 2
    for argument, message in (('bits=two', 'type int'), ('bits', 'no value'), ('flag=yes', 'type bool')):
        with pytest.raises(UserError, match=message):
            parse_argument(argument, bits=2, flag=False)


def test_steps_count_where_both_are_given():
    config = base_config()
    config.train.epochs = 2.5
    config.optimizer.warmup_steps, config.optimizer.warmup_epochs = 3, 100.0
    assert duration(config, 'train.', 10.0) == 25
    assert duration(config, 'optimizer.warmup_', 10.0) == 3
    config.train.steps = 0
    assert duration(config, 'train.', 10.0) == 0
    config.partner.epochs = 1e300
    with pytest.raises(UserError, match=r'partner.epochs=1e\+300: with 10 steps'):
        duration(config, 'partner.', 10.0)


def test_a_config_survives_json():
    plain = to_plain(base_config())
    assert json.loads(json.dumps(plain)) == plain
    assert changed_keys(plain, to_plain(base_config())) == []


def test_only_safe_keys_may_change(tmp_path):
    old, new = base_config(), base_config()
    new.data.dir, new.checkpoint.keep, new.mesh.data = 'elsewhere', 5, 2
    check_resumable(to_plain(old), to_plain(new), tmp_path)
    new.optimizer.learning_rate = 0.5
    new.quant.rules = ()
    with pytest.raises(UserError) as error:
        check_resumable(to_plain(old), to_plain(new), tmp_path)
    assert 'optimizer.learning_rate: 0.1 -> 0.5' in str(error.value)
    assert 'quant.rules' in str(error.value)
    assert 'data.dir:' not in str(error.value)


def test_a_key_that_came_has_its_default_and_one_that_went_is_told(tmp_path):
    new = to_plain(base_config())
    old = json.loads(json.dumps(new))
    del old['init'], old['optimizer']['clip_norm'], old['data']['dir']
    check_resumable(old, new, tmp_path)
    changed = json.loads(json.dumps(new))
    changed['optimizer']['clip_norm'] = 1.0
    with pytest.raises(UserError, match=r'optimizer.clip_norm: 0.0 -> 1.0'):
        check_resumable(old, changed, tmp_path)
    with pytest.raises(UserError, match=r'key train.gone, which this version'):
        check_resumable({**new, 'train': {**new['train'], 'gone': 1}}, new, tmp_path)


def test_training_further_is_led_to_another_workdir(tmp_path):
    old, new = base_config(), base_config()
    new.train.steps = 100
    with pytest.raises(UserError, match=f'init.workdir={tmp_path}'):
        check_resumable(to_plain(old), to_plain(new), tmp_path)
