import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_a_short_measurement():
    options = ['--images=64', '--rounds=1', '--batch_size=32', '--workers=0,1']
    process = subprocess.run(
        [sys.executable, '-m', 'benchmarks.input', *options],
        cwd=ROOT, env={'JAX_PLATFORMS': 'cpu'}, check=True, timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    rows = process.stdout.strip().splitlines()[-3:]  # TensorFlow Datasets speaks first
    assert [row.split(' | ')[0] for row in rows] == ['| bare loop', '| threads of the process', '| 1 workers']
