"""Verdicts: what runs, what is decided, what is written; training is stood in for, but for the slow ones."""

import json
import statistics
import subprocess
import sys

import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import to_plain
from bqat_jax.quantizers import ESTIMATORS
from bqat_jax.registry import load_plugins
from bqat_jax.storage import write_json
from bqat_jax.sweeps import execution
from research.verdict import __main__ as program
from research.verdict.answers import BETTER, NOT_DISTINGUISHABLE, UNDECIDED, WORSE, Comparison, answer
from research.verdict.page import markdown
from research.verdict.paired_tests import Paired
from research.verdict.settings import digits_setting, find_settings, method_of
from research.verdict.trial import score_of, try_out
from tests.conftest import ROOT

PLUGIN = ROOT / 'examples' / 'my_estimators.py'
NOISE = (0.010, -0.012, 0.004, 0.008, -0.006, 0.001, -0.009, 0.005)
OTHER_NOISE = (0.002, 0.007, -0.011, 0.003, -0.004, 0.009, 0.006, -0.008)


class Training:
    """Stands in for the training program; scores by estimator, seed and rate."""

    def __init__(self):
        self.ran, self.diverges, self.error = [], set(), None

    def prepare_partner(self, config, workdir, *, name, console, **options):
        workdir.mkdir(parents=True, exist_ok=True)

    def train(self, config, workdir, *, name, console, **options):
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / 'config.json', to_plain(config))
        method = config.quant.weights.estimator if config.replacement.plan == 'none' else 'prefix'
        seeds = range(config.seed, config.seed + config.train.replicas)
        self.ran.append((method, config.optimizer.learning_rate, *seeds))
        if method in self.diverges:
            raise UserError('The loss or a parameter became NaN or infinite in step 3 of phase lp. Lower the rate.')
        if self.error is not None:
            raise self.error
        top1 = {str(seed): self.top1(method, seed, config.optimizer.learning_rate) for seed in seeds}
        result = {'top1': statistics.mean(top1.values()), 'fp_top1': 0.99, 'steps': 5, 'checkpoint_step': 5}
        result |= {'seconds': 8.0, 'validation_top1': result['top1'], 'top1_by_seed': top1}
        result |= {'validation_top1_by_seed': top1}
        write_json(workdir / 'result.json', result)
        return result

    @staticmethod
    def top1(method, seed, rate):
        mean = {'copy': 0.9, 'identity': 0.9, 'turned': 0.2, 'ewgs': 0.9, 'prefix': 0.91}[method]
        noise = NOISE if method in ('copy', 'identity') else OTHER_NOISE
        return mean + noise[seed % 8] - 0.1 * abs(rate - 0.08)


@pytest.fixture
def training(monkeypatch, registries):
    for name in ('copy', 'turned'):
        ESTIMATORS.entries.pop(name, None)
    for module in [name for name in sys.modules if name.startswith('bqat_jax_plugin_my_estimators')]:
        monkeypatch.delitem(sys.modules, module)
    load_plugins([PLUGIN])
    training = Training()
    monkeypatch.setattr(execution, 'train', training.train)
    monkeypatch.setattr(execution, 'prepare_partner', training.prepare_partner)
    return training


def judge(estimator, workdir, references=('identity', 'ewgs', 'plan=prefix')):
    workdir.mkdir(exist_ok=True)
    methods = [method_of(text) for text in references]
    settings = [digits_setting(None, PLUGIN)]
    return try_out(method_of(estimator), methods, settings, workdir, PLUGIN, lambda known: program.save(workdir, known))


def outcomes(verdict):
    return {one.comparison.reference: one.outcome for one in verdict.answers}


def test_a_copy_is_not_distinguishable_and_a_turned_rule_is_worse(training, tmp_path):
    copy = judge('copy', tmp_path / 'copy')
    assert outcomes(copy) == dict.fromkeys(('identity', 'ewgs', 'plan prefix'), NOT_DISTINGUISHABLE)
    same, ewgs, _ = copy.answers
    # What is the same in every seed is not looked at again; the others are, to the end.
    assert same.is_same and len(same.comparison.looks) == 1 and [x.seeds for x in ewgs.comparison.looks] == [4, 8]
    assert ('identity', 0.08, 4, 5, 6, 7) not in training.ran and ('ewgs', 0.08, 4, 5, 6, 7) in training.ran
    page = (tmp_path / 'copy' / 'verdict.md').read_text()
    assert 'copy is not distinguishable from identity (equal in every seed)' in page and 'power to detect' in page
    assert (tmp_path / 'copy' / 'verdict.svg').read_text().startswith('<?xml')
    turned = judge('turned', tmp_path / 'turned')
    assert outcomes(turned) == dict.fromkeys(('identity', 'ewgs', 'plan prefix'), WORSE)
    assert all(len(one.comparison.looks) == 1 for one in turned.answers)  # four seeds decide
    written = json.loads((tmp_path / 'turned' / 'verdict.json').read_text())
    assert written['is_complete'] and [one['outcome'] for one in written['answers']] == [WORSE] * 3
    assert written['scores']['digits narrow W2A2']['turned']['choice']['optimizer.learning_rate'] == 0.08


def test_the_same_command_goes_on_and_runs_nothing_twice(training, tmp_path):
    judge('copy', tmp_path / 'copy')
    count, page = len(training.ran), (tmp_path / 'copy' / 'verdict.md').read_text()
    judge('copy', tmp_path / 'copy')
    assert len(training.ran) == count and (tmp_path / 'copy' / 'verdict.md').read_text() == page


@pytest.mark.parametrize('diverges', ['turned', 'ewgs'])
def test_what_diverges_counts_as_worst_and_ends_nothing(training, tmp_path, diverges):
    training.diverges = {diverges}
    verdict = judge('turned', tmp_path / 'turned')
    assert verdict.is_complete
    assert outcomes(verdict)['ewgs'] == (WORSE if diverges == 'turned' else BETTER)
    assert 'Diverged, scored as 0 %' in markdown(verdict) and 'all diverged' in markdown(verdict)


def test_another_failure_ends_it_and_names_the_plugin(training, tmp_path):
    training.error = ValueError('no such thing')
    with pytest.raises(UserError, match=r'failed: ValueError: no such thing Remove its error\.json'):
        judge('turned', tmp_path / 'turned')
    failed = {'workdir': 'a/seed 0', 'error': 'TypeError: no', 'plugin': 'The plugin mine.py, line 7,'}
    with pytest.raises(UserError, match=r'mine\.py, line 7, raised TypeError: no .*another --workdir'):
        score_of({'failed': [failed], 'by_seed': {}, 'choices': [], 'choice': None}, 4, tmp_path)


def test_later_comparisons_count_from_the_start():
    looks = (Paired(-0.02, 0.006, 4, False),)
    own = Comparison('a', 'identity', (4, 8), looks)
    (alone,) = answer([own])
    assert alone.outcome == UNDECIDED and 0.05 < alone.p < 0.1
    (ended,) = answer([Comparison('a', 'identity', (4, 8), (*looks, Paired(-0.02, 0.006, 8, False)))])
    assert ended.outcome == WORSE
    first, second = answer([own, Comparison('b', 'identity', (4, 8))])
    assert first.p == pytest.approx(2 * alone.p) and second.outcome == UNDECIDED and second.p == 1.0


def test_methods_and_settings_that_cannot_be_tried(tmp_path):
    assert 'quant.activations.estimator' not in method_of('psgd').overrides
    assert method_of('ewgs:delta=0.1').name == 'ewgs delta 0.1'
    for text, message in (('ewgz', "'ewgz'.*Did you mean 'ewgs'"), ('reste', 'one bit')):
        with pytest.raises(UserError, match=message):
            method_of(text)
    with pytest.raises(UserError, match='partner_file is not set'):
        find_settings(None, str(tmp_path), None, None)
    with pytest.raises(UserError, match=r'cifar_dir=.*absent: it does not exist'):
        find_settings(None, f'{tmp_path}/absent', str(tmp_path), None)
    digits, cifar = find_settings(None, str(tmp_path), str(tmp_path), None)
    assert (digits.name, cifar.name) == ('digits narrow W2A2', 'CIFAR-10 short W2A2')
    assert cifar.config.replacement.temperature == 4.0
    assert cifar.config.quant.weights.bits == 2 and cifar.config.replacement.distillation == 0.0


def test_a_workdir_of_another_question_is_refused(training, tmp_path):
    judge('copy', tmp_path)
    plugin, candidate, references = PLUGIN, method_of('copy'), [method_of('identity')]
    with pytest.raises(UserError, match=r'references: .*another --workdir'):
        program.check_workdir(tmp_path, candidate, references, plugin)
    changed = tmp_path / 'my_estimators.py'
    changed.write_text(PLUGIN.read_text() + '\n')
    references = [method_of(text) for text in ('identity', 'ewgs', 'plan=prefix')]
    program.check_workdir(tmp_path, candidate, references, plugin)
    with pytest.raises(UserError, match='plugin: '):
        program.check_workdir(tmp_path, candidate, references, changed)


BROKEN = """
import bqat_jax as bq

@bq.register_estimator('broken')
class Broken(bq.Estimator):
    def backward(self, cotangent, value, rounded, context):
        return cotangent * missing
"""


def run(arguments):
    command = [sys.executable, '-m', 'research.verdict', *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_rule_that_raises_is_told_by_file_and_line_before_anything_runs(tmp_path):
    (tmp_path / 'broken.py').write_text(BROKEN)
    done = run([f'--plugin={tmp_path}/broken.py', '--estimator=broken', f'--workdir={tmp_path}/run'])
    assert done.returncode == 1 and not (tmp_path / 'run').exists()
    assert f'The plugin {tmp_path}/broken.py, line 7, raised NameError' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(('estimator', 'outcome'), [('copy', NOT_DISTINGUISHABLE), ('turned', WORSE)])
def test_the_example_of_the_docs(digits_dir, tmp_path, estimator, outcome):
    what = [f'--plugin={PLUGIN}', f'--estimator={estimator}', '--reference=identity']
    done = run([*what, f'--data_dir={digits_dir}', f'--workdir={tmp_path}'])
    assert done.returncode == 0, done.stdout + done.stderr
    (answer,) = json.loads((tmp_path / 'verdict.json').read_text())['answers']
    assert answer['outcome'] == outcome and answer['the_same_in_every_seed'] == (estimator == 'copy')
