"""Sweeps: what runs, what is chosen, what is written; the runs themselves are stood in for, but for one real kill."""

import csv
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
from scipy import stats

from bqat_jax.errors import UserError
from bqat_jax.storage import BucketError, InUse, Lost, write_json
from bqat_jax.sweeps import Sweep, execution, reporting
from bqat_jax.sweeps.choices import beyond
from bqat_jax.sweeps.definition import load_sweep, override
from bqat_jax.sweeps.tables import paired_difference
from tests.conftest import ONE_DEVICE, ROOT
from tests.experiment.test_configuration import load_recipe
from tests.report.test_pages import check
from tests.sweeps.conftest import FILE, run

RATE, PATHS = 'optimizer.learning_rate', 'replacement.paths'
BEST = {'none': 0.1, 'prefix': 0.35}
SWEEPS = sorted(path for path in (ROOT / 'configs' / 'sweeps').glob('*.py') if path.stem != 'common')


def test_every_method_is_run_with_its_own_best_choice(config, training, tmp_path):
    result = run(config, tmp_path / 'sweep')
    assert result['runs'] == len(training.ran) == 2 * 2 * (2 * 2 + 3) and result['failed'] == 0
    methods = json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['settings']['W4A4']
    assert methods['plain']['choice'] == {RATE: 0.1} and methods['prefix']['choice'] == {RATE: 0.2}
    assert methods['prefix']['mean'] == pytest.approx(0.851) and methods['prefix']['std'] == pytest.approx(0.001)
    assert methods['prefix']['difference']['mean'] == pytest.approx(0.05) and methods['plain']['difference'] is None
    # What was compared was not chosen on.
    assert {seed for *_, seed in training.ran} == {0, 1, 2, 10, 11}
    rows = list(csv.DictReader((tmp_path / 'sweep' / 'sweep.csv').read_text().splitlines()))
    assert len(rows) == 12 and rows[0]['setting'] == 'W2A2' and rows[0]['choice'] == 'learning_rate 0.1'
    table = (tmp_path / 'sweep' / 'sweep.md').read_text()
    assert '| W4A4 | prefix | learning_rate 0.2 | 3 | 5 | 85.10 ± 0.10 | +5.00 (+5.00 to +5.00) | 2 |' in table
    assert (tmp_path / 'sweep' / 'sweep.png').read_bytes().startswith(b'\x89PNG')


def test_a_sweep_ends_with_its_report(config, training, tmp_path, monkeypatch, caplog):
    config.report = True
    training.fails = lambda config: config.replacement.plan == 'none' and config.seed == 1
    run(config, tmp_path / 'sweep')
    page = check((tmp_path / 'sweep' / 'report.html').read_text())
    assert 'could not be made' not in page and 'Failed: W2A2/plain/seed 1: UserError: the loss became NaN' in page
    assert 'W4A4, prefix: optimizer.learning_rate 0.2' in page and 'at the edge' in page and '+5.00' in page
    assert '<td class="short">replacement.plan</td>' in page
    (tmp_path / 'sweep' / 'report.html').unlink()
    reporting.report(config, tmp_path / 'sweep')
    assert (tmp_path / 'sweep' / 'report.html').read_text() == page
    monkeypatch.setattr(reporting, 'write_text', lambda *arguments: 1 / 0)
    monkeypatch.setattr(logging.getLogger('bqat_jax'), 'propagate', True)
    assert run(config, tmp_path / 'sweep')['failed'] == 2
    assert 'ZeroDivisionError' in caplog.text and '--mode=report' in caplog.text


def test_of_a_task_whose_metric_is_better_when_smaller_the_smallest_is_chosen(config, training, tmp_path, monkeypatch):
    def train(config, workdir, **options):
        result = training.train(config, workdir, **options)
        result = {key.replace('top1', 'mse'): value for key, value in result.items()}
        write_json(workdir / 'result.json', result)
        return result

    monkeypatch.setattr(execution, 'train', train)
    config.task = 'regression'
    run(config, tmp_path / 'sweep')
    methods = json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['settings']['W4A4']
    assert methods['plain']['choice'] == {RATE: 0.2} and methods['prefix']['choice'] == {RATE: 0.1}
    table = (tmp_path / 'sweep' / 'sweep.md').read_text()
    assert '| steps | mean squared error | against plain |' in table and 'smaller is better' in table
    assert '| W4A4 | prefix | learning_rate 0.1 | 3 | 5 | 0.751 ± 0.001 | +0.05 (+0.05 to +0.05) | 2 |' in table
    (tmp_path / 'my_sweep.py').write_text(FILE.replace("'W2A2': {}", "'W2A2': {'task': 'classification'}"))
    with pytest.raises(UserError, match="task='classification': a sweep compares runs by one metric"):
        run(config, tmp_path / 'other')


def test_a_choice_at_the_edge_of_its_grid_extends_it(config, training, tmp_path, monkeypatch):
    """The plan none is best at 0.1, the smallest; prefix at 0.35, two steps beyond the largest, which fails."""
    config.sweep_extend, config.report = 2, True
    monkeypatch.setattr(
        training, 'top1', lambda config, seed: 0.5 - abs(config.optimizer.learning_rate - BEST[config.replacement.plan])
    )
    training.fails = lambda config: config.optimizer.learning_rate > 0.5
    run(config, tmp_path / 'sweep')
    methods = json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['settings']['W2A2']
    tried = {name: [one['overrides'][RATE] for one in row['choices']] for name, row in methods.items()}
    assert tried == {'plain': [0.1, 0.2, 0.05], 'prefix': [0.1, 0.2, 0.4, 0.8]}
    assert [one.get('added', False) for one in methods['prefix']['choices']] == [False, False, True, True]
    assert methods['plain']['choice'] == {RATE: 0.1} and methods['prefix']['choice'] == {RATE: 0.4}
    table = (tmp_path / 'sweep' / 'sweep.md').read_text()
    assert '| W2A2 | prefix | learning_rate 0.4 (added) |' in table and '| plain | learning_rate 0.1 |' in table
    assert '0.4 (added), 0.8 (added)' in check((tmp_path / 'sweep' / 'report.html').read_text())
    count = len(training.ran)
    run(config, tmp_path / 'sweep')
    assert len(training.ran) == count


@pytest.mark.parametrize(
    ('candidates', 'chosen', 'added'),
    [
        ([{RATE: 0.02}, {RATE: 0.08}], 1, {RATE: 0.32}),
        ([{RATE: 0.08}, {RATE: 0.02}], 1, {RATE: 0.005}),
        ([{RATE: 0.1}, {RATE: 0.2}, {RATE: 0.8}], 2, {RATE: 3.2}),
        ([{RATE: 0.1}, {RATE: 0.2}, {RATE: 0.8}], 1, None),
        ([{RATE: 0.1, 'a': 9.0}, {RATE: 0.2, 'a': 3.0}], 1, {RATE: 0.4, 'a': 1.0}),
        (
            [{'replacement.paths': 2, 'b': 'x'}, {'replacement.paths': 3, 'b': 'x'}],
            1,
            {'replacement.paths': 4, 'b': 'x'},
        ),
        ([{PATHS: 1}, {PATHS: 2}], 0, None),  # 0.5 paths
        ([{'optimizer.momentum': 0.5}, {'optimizer.momentum': 0.9}], 1, None),  # out of its range
        ([{RATE: 0.0}, {RATE: 0.2}], 1, None),
        ([{'a': 1.0, 'b': 1.0}, {'a': 1.0, 'b': 2.0}, {'a': 2.0, 'b': 1.0}], 2, None),  # no line
        ([{'data.flip': False}, {'data.flip': True}], 1, None),
        ([{RATE: 0.1}, {'a': 0.2}], 1, None),
        ([{RATE: 0.1}], 0, None),
    ],
)
def test_what_lies_beyond_the_edge(candidates, chosen, added):
    assert beyond(candidates, candidates[chosen]) == added


def test_no_run_is_started_twice(config, training, tmp_path):
    run(config, tmp_path / 'sweep')
    first, table = list(training.ran), (tmp_path / 'sweep' / 'sweep.json').read_text()
    run(config, tmp_path / 'sweep')
    assert training.ran == first and (tmp_path / 'sweep' / 'sweep.json').read_text() == table


@pytest.mark.parametrize('done', [0, 1, 9, 20])
def test_what_was_cut_off_goes_on(config, training, tmp_path, done):
    training.stops_after = done
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / 'sweep')
    training.stops_after = None
    assert run(config, tmp_path / 'sweep')['failed'] == 0
    assert len(training.ran) == len(set(training.ran)) == 28


def test_a_failed_run_is_recorded_and_stops_no_other(config, training, tmp_path):
    training.fails = lambda config: config.optimizer.learning_rate == 0.2 and config.seed == 10
    result = run(config, tmp_path / 'sweep')
    assert result['failed'] == 4
    methods = json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['settings']['W2A2']
    # A choice that failed with one seed is not taken, whatever the other gave.
    assert methods['prefix']['choice'] == {RATE: 0.1} and len(methods['prefix']['by_seed']) == 3
    assert 'the loss became NaN' in (tmp_path / 'sweep' / 'sweep.md').read_text()
    count = len(training.ran)
    run(config, tmp_path / 'sweep')
    assert len(training.ran) == count  # nor is it tried again


@pytest.mark.parametrize('error', [BucketError('refused'), Lost(), InUse('in use')])
def test_what_a_bucket_does_is_no_failure_of_a_run(config, training, tmp_path, monkeypatch, error):
    def train(*args, **options):
        raise error

    monkeypatch.setattr(execution, 'train', train)
    with pytest.raises(type(error)):
        run(config, tmp_path)
    assert not list(tmp_path.rglob('error.json'))


def test_a_method_that_always_fails_leaves_a_row(config, training, tmp_path):
    training.fails = lambda config: config.replacement.plan == 'prefix'
    run(config, tmp_path / 'sweep')
    assert '| W2A2 | prefix |  | 0 |  | failed |' in (tmp_path / 'sweep' / 'sweep.md').read_text()


def test_seeds_side_by_side(config, training, tmp_path):
    config.train.replicas = 2
    run(config, tmp_path / 'sweep')
    assert {seeds for _, _, _, *seeds in map(tuple, training.ran) for seeds in [tuple(seeds)]} == {
        (10, 11),
        (0, 1),
        (2,),
    }
    method = json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['settings']['W2A2']['prefix']
    assert list(method['by_seed']) == ['0', '1', '2'] and method['by_seed']['1']['seconds'] == 1.0
    assert method['std'] == pytest.approx(0.001)


def test_a_result_of_another_config_is_not_taken(config, training, tmp_path):
    run(config, tmp_path / 'sweep')
    config.train.batch_size = 8
    with pytest.raises(UserError, match=r'train\.batch_size: 64 -> 8'):
        run(config, tmp_path / 'sweep')


def test_differences_are_students():
    baseline = {str(seed): 0.7 + 0.01 * seed for seed in range(6)}
    shifts = (0.02, 0.0, 0.01, 0.03, -0.01, 0.02)
    values = {seed: baseline[seed] + shift for seed, shift in zip(baseline, shifts, strict=True)}
    difference = paired_difference(values | {'9': 1.0}, baseline)
    differences = [values[seed] - baseline[seed] for seed in baseline]
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert difference is not None and difference['seeds'] == 6
    assert [difference['mean'], difference['low'], difference['high']] == pytest.approx(
        [statistics.mean(differences), low, high]
    )
    assert paired_difference({'0': 1.0}, baseline) is None


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'baseline': 'other'}, 'baseline'),
        ({'seeds': (0, 2)}, 'consecutive'),
        ({'seeds': ()}, 'at least one seed'),
        ({'choices': [{}], 'choice_seeds': ()}, 'choice_seeds'),
        ({'choice_seeds': (1, 2)}, 'must not overlap'),
        ({'methods': {'a/b': {}}, 'baseline': 'a/b'}, 'folder'),
    ],
)
def test_sweeps_that_cannot_be_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**{'methods': {'a': {}}, 'seeds': (0, 1), 'baseline': 'a', **changes})


def test_mistakes_in_a_sweep_are_told_before_anything_runs(config, training, tmp_path):
    with pytest.raises(UserError, match='no such Python file'):
        load_sweep('absent.py')
    with pytest.raises(UserError, match='Which sweep'):
        load_sweep(None)
    for text, message in (
        (FILE.replace('replacement.plan', 'replacement.pln'), 'pln'),
        (FILE.replace("'none'", '3'), 'replacement.plan=3'),
        (FILE.replace('range(3)', 'rang(3)'), 'NameError'),
        ('def get_sweep():\n    return 3\n', 'int'),
    ):
        (tmp_path / 'my_sweep.py').write_text(text)
        with pytest.raises(UserError, match=message):
            run(config, tmp_path / 'sweep')
    (tmp_path / 'my_sweep.py').write_text(FILE)
    with pytest.raises(UserError, match='validation_fraction'):
        run(override(config, {'data.validation_fraction': 0.0}), tmp_path / 'sweep')
    assert training.ran == []


def test_a_validation_split_of_its_own_is_enough_to_choose_on(config, training, tmp_path):
    run(override(config, {'data.validation_fraction': 0.0, 'data.validation_split': 'validation'}), tmp_path / 'sweep')
    assert training.ran


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
def test_sweeps_that_are_shipped_fit_their_recipes(path):
    sweep = load_sweep(str(path))
    recipe = ROOT / 'configs' / ('digits.py' if path.stem.startswith('digits') else 'cifar10_resnet20.py')
    for setting in sweep.settings.values():
        for method in sweep.methods.values():
            override(load_recipe(recipe).get_config(), setting, method, *sweep.choices[:1])


@pytest.mark.slow
def test_a_killed_sweep_goes_on(digits_dir, tmp_path):
    """A real one: killed with SIGKILL between two runs, or within one; finished runs stay as they are."""
    (tmp_path / 'sweep.py').write_text(
        'from bqat_jax.sweeps import Sweep\n\n'
        "def get_sweep():\n    return Sweep({'plain': {'replacement.distillation': 0.0}}, range(3), 'plain')\n"
    )
    command = [sys.executable, 'main.py', '--mode=sweep', f'--config.sweep={tmp_path}/sweep.py']
    command += [f'--workdir={tmp_path}/run', f'--config.data.dir={digits_dir}', '--config.replacement.plan=none']
    command += ['--config.network.width=4', '--config.partner.steps=2', '--config.partner.optimizer.warmup_steps=0']
    command += ['--config.train.steps=6', '--config.checkpoint.every_steps=1', '--config.quant.calibration_batches=1']
    command += ['--config.report=false']
    environment = {**os.environ, 'XLA_FLAGS': ONE_DEVICE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    results = [tmp_path / 'run' / 'all' / 'plain' / f'seed {seed}' / 'result.json' for seed in range(3)]
    end = time.monotonic() + 300
    while not results[0].exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = results[0].stat().st_mtime_ns
    assert not results[2].exists()
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert results[0].stat().st_mtime_ns == before
    method = json.loads((tmp_path / 'run' / 'sweep.json').read_text())['settings']['all']['plain']
    assert list(method['by_seed']) == ['0', '1', '2'] and method['failed'] == []
