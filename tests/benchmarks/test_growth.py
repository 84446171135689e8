import os

import numpy as np
import pytest

from benchmarks.growth import growth, last_step, resident_bytes, table


@pytest.mark.parametrize('slope', [0.0, 1000.0, -50.0])
def test_growth_is_that_of_the_second_half(slope):
    """What is taken in the first half, and kept, is no growth."""
    steps = np.arange(20, 2000, 20)
    sizes = 1e9 - 1e8 * (steps < 900) + slope * steps
    seen = [(int(step), int(size)) for step, size in zip(steps, sizes, strict=True)]
    assert growth(seen) == pytest.approx(slope, abs=1e-2)
    rows = table(seen).splitlines()
    assert len(rows) == 2 + 10 + 2 and rows[-1] == f'Growth: {1000 * growth(seen) / 2**20:.3f} MiB in 1000 steps.'


def test_too_few_readings_are_no_growth():
    with pytest.raises(ValueError, match='Use more steps'):
        growth([(10, 1), (20, 1), (30, 2)])


def test_the_step_is_that_of_the_last_whole_training_record(tmp_path):
    metrics = tmp_path / 'metrics.jsonl'
    assert last_step(metrics) == 0
    metrics.write_text('{"phase": "pretrain", "step": 9}\n')
    assert last_step(metrics) == 0
    lines = ''.join(f'{{"phase": "train", "step": {step}}}\n' for step in range(2000))
    metrics.write_text(lines + '{"phase": "test"}\n{"phase": "train", "ste')
    assert last_step(metrics) == 1999


def test_resident_memory_is_that_of_a_process():
    before = resident_bytes(os.getpid())
    array = np.ones(2**23)
    assert resident_bytes(os.getpid()) - before > 0.9 * array.nbytes
