import json
import subprocess
import sys

import pytest

from benchmarks.scaling import AXES, case, cuts, growth, table
from tests.conftest import ONE_DEVICE, ROOT


def test_the_growth_of_a_power_is_its_exponent():
    assert growth([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert growth([2, 3, 9], [5.0, 5.0, 5.0]) == pytest.approx(0)


def test_cuts_are_spread_evenly():
    assert cuts(20, 3) == ['stage1_block3', 'stage2_block3']
    assert cuts(8, 3) == ['stage1_block1', 'stage2_block1']
    assert len(set(cuts(32, 9))) == 8
    with pytest.raises(ValueError, match='2 to 3 blocks'):
        cuts(8, 4)


@pytest.mark.parametrize('axis', AXES)
def test_every_axis_changes_something(axis):
    first, second = (case(axis, value, 'lsq', ['--config=configs/digits.py'], 20) for value in AXES[axis][:2])
    assert first != second and first.arguments[0] == '--config=configs/digits.py'


def test_the_table_has_a_line_for_each_variant():
    one, two = {'seconds': [1.0, 1.0, 9.0]}, {'seconds': [2.0]}
    assert table('depth', {'lsq': {8: one, 16: two}}).splitlines()[2:] == ['| lsq, ms | 1000 | 2000 | 2.00 | 1.00 |']


@pytest.mark.slow
@pytest.mark.parametrize('axis', AXES)
def test_a_short_measurement(axis, tmp_path):
    values = {'depth': '8,14', 'blocks': '2,3', 'bits': '2,4', 'batch': '8,16', 'replicas': '1,2', 'devices': '1,2'}
    flags = ['--config=configs/digits.py', '--config.network.width=4', '--config.train.batch_size=16']
    options = [f'--axis={axis}', f'--values={values[axis]}', '--variants=lsq', '--turns=1', '--steps=1']
    subprocess.run(
        [sys.executable, '-m', 'benchmarks.scaling', *flags, *options, f'--output={tmp_path}/measured.json'],
        cwd=ROOT, env={'XLA_FLAGS': ONE_DEVICE, 'JAX_PLATFORMS': 'cpu'}, check=True, timeout=300,
    )  # fmt: skip
    assert len(json.loads((tmp_path / 'measured.json').read_text())['lsq']) == 2
