import pytest

from research.draw_diagnoses import MEASURES, draw, read_diagnoses
from tests.research.test_diagnose_runs import make_run


def test_seeds_are_joined_by_method_and_steps_are_in_order(tmp_path):
    runs = [
        make_run(tmp_path / 'LSQ' / 'seed 0', step_9=7.0, step_10=1.0),
        make_run(tmp_path / 'LSQ' / 'seed 1', step_9=5.0, step_10=2.0),
        make_run(tmp_path / 'prefix' / 'seed 0', step_9=3.0, step_10=4.0),
    ]
    methods = read_diagnoses(runs)
    assert list(methods) == ['LSQ', 'prefix'] and list(methods['LSQ']) == list(MEASURES)
    assert methods['LSQ']['relative error of features']['block 2'] == {9: [7.0, 5.0], 10: [1.0, 2.0]}
    assert list(methods['LSQ']['relative error of features']['block 2']) == [9, 10]
    draw(tmp_path / 'picture.png', methods)
    assert (tmp_path / 'picture.png').stat().st_size > 10_000


def test_a_single_diagnosis_is_no_curve(tmp_path):
    with pytest.raises(SystemExit, match='has 1 diagnoses, and a curve needs two'):
        read_diagnoses([make_run(tmp_path / 'LSQ' / 'seed 0', step_10=1.0)])
