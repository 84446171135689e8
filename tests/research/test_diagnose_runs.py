import json

import pytest

from bqat_jax.errors import UserError
from research.diagnose_runs import COLUMNS, diagnose_runs


def diagnosis(value):
    measures = ('cosine_to_full_precision', 'cosine_to_smoothed', 'variance')
    blocks = {f'block {number}': dict.fromkeys(measures, value + number - 1.5) for number in (1, 2)}
    return {
        'gradients': {'lp': {'blocks': blocks}, 'full': {'blocks': blocks}},
        'features': {
            'block 1': {'cka': 0.0, 'relative_error': 0.0},
            'block 2': {'cka': value, 'relative_error': value},
        },
        'oscillating': {'conv1': value / 100, 'conv2': value / 100},
    }


def make_run(workdir, **diagnoses):
    (workdir / 'diagnosis').mkdir(parents=True)
    (workdir / 'config.json').write_text('{}')
    for name, value in diagnoses.items():
        (workdir / 'diagnosis' / f'{name}.json').write_text(json.dumps(diagnosis(value)))
    return workdir


def test_runs_of_one_method_are_a_row_and_the_newest_diagnosis_counts(tmp_path):
    runs = [
        make_run(tmp_path / 'W2A2' / 'LSQ' / 'seed 0', step_9=7.0, step_10=1.0),
        make_run(tmp_path / 'W2A2' / 'LSQ' / 'seed 1', step_10=2.0),
        make_run(tmp_path / 'W2A2' / 'prefix' / 'seed 0', step_10=4.0),
    ]
    diagnose_runs(runs, tmp_path / 'table.md')
    header, _, *rows = (tmp_path / 'table.md').read_text().splitlines()
    assert [cell.strip() for cell in header.strip('|').split('|')] == ['runs', 'seeds', *COLUMNS]
    assert rows == [
        f'| W2A2/LSQ | 2 | {" | ".join(["1.500"] * len(COLUMNS))} |',
        f'| W2A2/prefix | 1 | {" | ".join(["4.000"] * len(COLUMNS))} |',
    ]


def test_a_folder_without_a_run_is_told(tmp_path):
    with pytest.raises(UserError, match='holds no run'):
        diagnose_runs([tmp_path], tmp_path / 'table.md')
