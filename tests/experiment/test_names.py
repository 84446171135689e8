"""Every quantizer and every estimator from the command line: 20 steps on the digits and on CIFAR-10."""

import json
import os
import subprocess
import sys

import pytest

from bqat_jax.quantizers import QUANTIZERS
from bqat_jax.quantizers.estimators import ESTIMATORS
from research.compare_estimators import settings_of
from tests.conftest import ROOT


def fits(quantizer, estimator):
    try:
        return settings_of(quantizer, estimator)
    except ValueError:
        return None


def pairs():
    """Every quantizer with an estimator of its own, as far as there are any left that fit."""
    left = list(ESTIMATORS)
    # Those that fit few quantizers choose first.
    for quantizer in sorted(QUANTIZERS, key=lambda name: sum(fits(name, rule) is not None for rule in left)):
        rule = next((rule for rule in left[::-1] if fits(quantizer, rule)), 'identity')
        if rule in left:
            left.remove(rule)
        yield quantizer, rule
    for rule in left:
        yield next(name for name in QUANTIZERS if fits(name, rule)), rule


@pytest.mark.slow
@pytest.mark.parametrize('data', ['digits', 'cifar10'])
@pytest.mark.parametrize(('quantizer', 'estimator'), [*pairs()])
def test_runs(quantizer, estimator, data, tmp_path, request):
    settings = fits(quantizer, estimator)
    flags = [f'--workdir={tmp_path}', '--config.train.steps=20', '--config.train.log_every_steps=10']
    for role, keys in settings.items():
        # Of what sign a layer's input is, calibration finds out.
        flags += [f'--config.quant.{role}.{key}={value}' for key, value in keys.items() if key != 'sign']
    flags += [f'--config.quant.trace.{key}' for key in ('every_steps=10', 'batches=1', 'iterations=3')]
    flags += ['--config.report=false']
    if data == 'digits':
        flags += [f'--config.data.dir={request.getfixturevalue("digits_dir")}', '--config.partner.epochs=10']
    else:
        pytest.importorskip('torch', reason='PyTorch, which reads the weights, is not installed')
        shared = request.getfixturevalue('shared_data')
        # The recipe comes before what changes it.
        flags = ['--config=configs/cifar10_resnet20.py:plan=none', *flags, f'--config.data.dir={shared / "tfds"}']
        flags += [f'--config.partner.torch_file={shared / "weights" / "cifar10_resnet20_optionA.th"}']
        flags += ['--config.optimizer.warmup_epochs=0.0', '--config.data.train_examples=4096']  # 20 steps see no more
    run = subprocess.run(
        [sys.executable, 'main.py', *flags],
        cwd=ROOT,
        env={**os.environ, 'XLA_FLAGS': ''},  # one device
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / 'result.json').read_text())
    print(data, quantizer, estimator, result['top1'])
    described = json.loads((tmp_path / 'quantizers.json').read_text())['stage2_block1/conv1']['weights']
    assert described['name'] == quantizer and described['estimator'] == estimator
    assert result['steps'] == 20 and 0 <= result['top1'] <= 1
