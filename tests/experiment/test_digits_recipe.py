"""The main job as it is, from nothing to a 2-bit network."""

import subprocess
import sys

import pytest

from bqat_jax.storage import read_json
from tests.conftest import ROOT


@pytest.mark.slow
def test_reaches_what_the_readme_promises(tmp_path, digits_dir):
    command = [sys.executable, str(ROOT / 'main.py'), f'--config.data.dir={digits_dir}']
    subprocess.run(command, cwd=tmp_path, check=True, env={'PATH': ''}, timeout=600)
    result = read_json(tmp_path / 'runs' / 'digits' / 'result.json')
    assert result['fp_top1'] >= 0.98
    assert result['top1'] >= 0.965
    assert (result['weight_bits'], result['activation_bits'], result['plan']) == (2, 2, 'prefix')
