"""Reports of real runs on the digits, short ones."""

import io
import logging
import subprocess
import sys

import numpy as np
import pytest
import rich.console

from bqat_jax.errors import UserError
from bqat_jax.experiment import reporting
from bqat_jax.experiment.finished import open_run
from bqat_jax.experiment.reporting import Network, read_metrics, report_run
from bqat_jax.experiment.run import train
from bqat_jax.replacement.task_kinds import MultiLabel
from bqat_jax.report.answers import Unavailable, make_answer_step
from bqat_jax.storage import read_json
from bqat_jax.sweeps.reporting import report
from tests.conftest import ROOT
from tests.experiment.test_run import shortened
from tests.experiment.test_task_recipes import data_dir, recipe  # noqa: F401 (fixtures)
from tests.report.test_pages import check


def made(digits_dir):
    config = shortened(digits_dir)
    config.report = True
    config.replacement.plan, config.replacement.distillation = 'none', 0.0  # compiled soonest
    config.train.steps = config.partner.steps = 4
    return config


@pytest.fixture(scope='module')
def finished(digits_dir, tmp_path_factory):
    """A finished run: config, workdir, what it printed."""
    config, workdir, printed = made(digits_dir), tmp_path_factory.mktemp('run'), io.StringIO()
    train(config, workdir, name='digits', overrides={'train.steps': 4}, console=rich.console.Console(file=printed))
    return config, workdir, printed.getvalue()


def test_a_run_ends_with_its_report(finished):
    _, workdir, printed = finished
    page = check((workdir / 'report.html').read_text())
    assert 'could not be made' not in page and 'Report: ' in printed
    result, summary = read_json(workdir / 'result.json'), read_json(workdir / 'summary.json')
    assert f'{100 * result["top1"]:.2f} %' in page and '360 test examples' in page
    assert all(f'aria-label="{layer["path"]}"' in page for layer in summary['layers'])
    assert 'train.steps' in page and 'Most confidently wrong' in page and '<img' in page


def test_the_mode_writes_the_same_page(finished):
    config, workdir, _ = finished
    before = (workdir / 'report.html').read_text()
    (workdir / 'report.html').unlink()
    assert report(config, workdir) == {'report': str(workdir / 'report.html')}
    assert (workdir / 'report.html').read_text() == before


def test_answers_are_those_that_were_evaluated(finished):
    config, workdir, _ = finished
    experiment, opened = open_run(config, workdir, rich.console.Console(file=io.StringIO()))
    answers = Network(experiment, lambda: opened, None, None).answers()
    result = read_json(workdir / 'result.json')
    assert answers.examples == answers.confusion.sum() == 360
    assert np.trace(answers.confusion) / 360 == pytest.approx(result['top1'])
    labels = [int(experiment.data.images.test[number]['label']) for number in range(360)]
    assert answers.confusion.sum(axis=1).tolist() == np.bincount(labels, minlength=10).tolist()
    images = [experiment.data.images.test[number]['image'].tobytes() for number in range(360)]
    for wrong in answers.most_confident:
        assert labels[images.index(wrong.image.tobytes())] == wrong.label != wrong.answer


def test_a_report_that_fails_leaves_the_run(finished, monkeypatch, caplog):
    config, workdir, _ = finished

    def fail(*arguments):
        raise OSError('the disk is full')

    monkeypatch.setattr(reporting, 'write_text', fail)
    monkeypatch.setattr(logging.getLogger('bqat_jax'), 'propagate', True)
    experiment, opened = open_run(config, workdir, rich.console.Console(file=io.StringIO()))
    monkeypatch.setattr(reporting, 'run_page', lambda *arguments: '')
    reporting.report_finished(experiment, opened, None, None, lambda: False)
    assert 'the disk is full' in caplog.text and '--mode=report' in caplog.text


def test_a_run_that_is_told_to_stop_measures_no_more(finished):
    config, workdir, _ = finished
    experiment, opened = open_run(config, workdir, rich.console.Console(file=io.StringIO()))
    before = (workdir / 'report.html').read_text()
    reporting.report_finished(experiment, opened, None, None, lambda: True)
    page = check((workdir / 'report.html').read_text())
    assert page.count('run was stopped before') >= 4 and 'could not be made' not in page
    (workdir / 'report.html').write_text(before)


def test_a_run_that_has_not_finished_is_shown_as_far_as_it_is(finished, tmp_path):
    config, workdir, _ = finished
    with pytest.raises(UserError, match='holds no run'):
        report_run(config, tmp_path)
    for name in ('config.json', 'environment.json', 'metrics.jsonl'):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    report_run(config, tmp_path)
    page = check((tmp_path / 'report.html').read_text())
    assert 'has not finished' in page and 'holds no finished partner' in page and 'could not be made' not in page
    (tmp_path / 'environment.json').unlink()
    (tmp_path / 'summary.json').write_text('{"half')
    report_run(config, tmp_path)
    page = check((tmp_path / 'report.html').read_text())
    assert 'summary.json is damaged' in page and 'There is no readable environment.json' in page


def test_a_sweep_without_tables_is_told(finished, tmp_path):
    config = finished[0].copy_and_resolve_references()
    config.sweep = 'sweep.py'
    with pytest.raises(UserError, match=r'no sweep\.json in it'):
        report(config, tmp_path)


def test_tasks_without_classes_have_no_confusion_matrix():
    with pytest.raises(Unavailable, match='does not choose between classes'):
        make_answer_step(MultiLabel(), 10)
    from bqat_jax.replacement.task_kinds import Classification

    with pytest.raises(Unavailable, match='5000 classes'):
        make_answer_step(Classification(), 5000)


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    (tmp_path / 'metrics.jsonl').write_bytes(
        b'{"phase": "train", "step": 1, "loss": NaN}\n[1]\n{"step": "x"}\n\xff\n{"st'
    )
    (line,) = read_metrics(tmp_path / 'metrics.jsonl')
    assert line['step'] == 1 and np.isnan(line['loss'])
    assert read_metrics(tmp_path / 'none.jsonl') == []


def test_a_start_of_the_program_does_not_load_matplotlib():
    code = 'import sys, bqat_jax.experiment.run; print([m for m in sys.modules if m.startswith("matplotlib")])'
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == '[]'


@pytest.mark.slow
def test_other_tasks_have_what_they_can_have(recipe, tmp_path):  # noqa: F811 (a fixture)
    """Tokens have classes and no images; pixels have classes each, and no wrong image."""
    name, config, _ = recipe
    config.report = True
    train(config, tmp_path, name=name)
    page = check((tmp_path / 'report.html').read_text())
    assert 'could not be made' not in page and 'Only images with one label each' in page
    assert ' answers, ' in page and 'Linear CKA' in page


@pytest.mark.slow
def test_two_seeds_that_are_trained_side_by_side_show_the_first(digits_dir, tmp_path):
    config = made(digits_dir)
    config.train.replicas = 2
    config.data.on_device = False
    train(config, tmp_path, name='digits')
    page = check((tmp_path / 'report.html').read_text())
    assert 'could not be made' not in page and 'standard deviation of 2 seeds' in page and '0, 1' in page
