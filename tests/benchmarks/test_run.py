import json
import subprocess
import sys

import pytest

from benchmarks.run import report
from tests.conftest import ONE_DEVICE, ROOT


def test_what_is_lost_is_told_against_the_bare_step():
    runs = [{'seconds': 1.1, 'start': 20.0}, {'seconds': 1.02, 'start': 5.0}, {'seconds': 1.05, 'start': 6.0}]
    cells = report([1.0, 1.0, 1.0], runs).splitlines()[-1].strip('| ').split(' | ')
    assert cells == ['1000.0', '1050.0', '5.0', '10.0, 2.0, 5.0', '20.0', '5.5', '0.28']


@pytest.mark.slow
def test_a_short_measurement(digits_dir, tmp_path):
    flags = ['--config=configs/digits.py', '--config.network.width=4', '--config.train.batch_size=16']
    flags += [f'--config.data.dir={digits_dir}', '--config.partner.steps=4', '--config.train.steps=6']
    flags += ['--config.partner.optimizer.warmup_steps=0', '--config.train.log_every_steps=2']
    command = [sys.executable, '-m', 'benchmarks.run', *flags, '--turns=2', '--steps=2']
    subprocess.run(
        [*command, f'--output={tmp_path}/measured.json'],
        cwd=ROOT, env={'XLA_FLAGS': ONE_DEVICE, 'JAX_PLATFORMS': 'cpu'}, check=True, timeout=300,
    )  # fmt: skip
    measured = json.loads((tmp_path / 'measured.json').read_text())
    assert len(measured['bare']) == len(measured['runs']) == 2
    assert measured['runs'][1]['start'] < measured['runs'][0]['start']
