import os
import sys
from pathlib import Path

import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import base_config, plugin_files
from bqat_jax.quantizers import ESTIMATORS, get_estimator
from bqat_jax.registry import load_plugins, place_in_plugins

PLUGIN = """
from bqat_jax.quantizers.estimators import register_estimator
from bqat_jax.quantizers.rounding import Estimator


@register_estimator('{name}')
class Mine(Estimator):
    strength: float = {strength}

    def backward(self, cotangent, value, rounded, context):
        return self.strength * cotangent
"""


def write(path, name='mine', strength=0.5):
    path.write_text(PLUGIN.format(name=name, strength=strength))
    return str(path)


def test_what_a_plugin_registers_can_be_named(tmp_path, registries):
    config = base_config()
    assert plugin_files(config) == ()
    config.plugins = f'{write(tmp_path / "first.py")}, {write(tmp_path / "second.py", "theirs", 2.0)},'
    assert plugin_files(config) == (tmp_path / 'first.py', tmp_path / 'second.py')
    load_plugins(plugin_files(config))
    assert get_estimator('mine:strength=0.25').strength == 0.25
    assert get_estimator('theirs').strength == 2.0


def test_a_plugin_is_run_again_only_after_a_change(tmp_path, registries):
    path = Path(write(tmp_path / 'changing.py'))
    load_plugins([path])
    before = ESTIMATORS.get('mine')
    load_plugins([path])
    assert ESTIMATORS.get('mine') is before
    write(tmp_path / 'changing.py', strength=3.0)
    os.utime(path, ns=(0, 0))
    load_plugins([path])
    assert get_estimator('mine').strength == 3.0


def test_two_plugins_cannot_share_a_name(tmp_path, registries):
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / 'my.py')
    with pytest.raises(UserError, match="'mine' is already"):
        load_plugins([tmp_path / 'a' / 'my.py', tmp_path / 'b' / 'my.py'])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'there is no file'),
        ('def', 'SyntaxError'),
        ('1 / 0', 'ZeroDivisionError'),
        (PLUGIN.format(name='identity', strength=1.0), "'identity' is already"),
        (PLUGIN.format(name='a:b', strength=1.0), 'cannot name'),
    ],
)
def test_a_plugin_that_fails_is_told(tmp_path, registries, content, message):
    path = tmp_path / 'failing.py'
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_plugins([path])
    other = tmp_path / 'notes.txt'
    other.write_text('')
    with pytest.raises(UserError, match=r'must end in \.py'):
        load_plugins([other])


def test_an_error_is_placed_in_the_plugin_that_raised_it(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('def rule(x):\n    return {}[x]\n\n\ndef call(x):\n    return int(rule(x))\n')
    load_plugins([path])
    module = next(module for module in sys.modules.values() if getattr(module, '__file__', None) == str(path))
    with pytest.raises(KeyError) as raised:
        module.call(3)
    assert place_in_plugins(raised.value) == f'The plugin {path}, line 2,'
    with pytest.raises(ZeroDivisionError) as raised:
        1 / 0  # noqa: B018
    assert place_in_plugins(raised.value) is None


def test_a_file_that_exits_is_told(tmp_path):
    path = tmp_path / 'exits.py'
    path.write_text('import sys\nsys.exit(3)\n')
    with pytest.raises(UserError, match='failed: SystemExit: 3'):
        load_plugins([path])
