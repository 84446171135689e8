"""The command line as people type it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(*flags):
    process = subprocess.run(
        [sys.executable, 'main.py', *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config.train.stps=3'], "Did you mean 'steps'"),
        (['--config.train.steps=None', '--config.train.steps=many'], 'many'),
        (['--config.train.epochs=inf'], 'train.epochs=inf: it must be at least 0 and finite'),
        (['--config=configs/digits.py:bit=2'], "Did you mean 'bits'"),
        (['--config=configs/absent.py'], 'absent.py'),
        (['--mode=tran'], 'train|evaluate'),
        (['--mode=evaluate', '--workdir=absent'], 'holds no run'),
        (['digits'], "'digits' is not understood"),
    ],
)
def test_what_is_mistyped_is_refused_in_plain_words(flags, message, tmp_path):
    if not any('workdir' in flag for flag in flags):
        flags = [*flags, f'--workdir={tmp_path}']
    code, output = run(*flags)
    assert code != 0
    assert message in output
    assert 'Traceback' not in output, output


@pytest.mark.parametrize(
    ('module', 'absent'),
    [
        ('main', ('tensorboardX', 'torch', 'matplotlib', 'tensorflow_datasets', 'orbax', 'grain')),
        ('bqat_jax.experiment.run', ('tensorboardX', 'torch', 'matplotlib')),
    ],
)
def test_what_takes_long_to_load_is_loaded_where_it_is_needed(module, absent):
    code = f'import sys, {module}; print([name for name in {absent} if name in sys.modules])'
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == '[]'
