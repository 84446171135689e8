"""What README and docs show works as written."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.quantizers import QUANTIZERS
from bqat_jax.quantizers.estimators import ESTIMATORS
from tests.conftest import ONE_DEVICE, ROOT

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md')), ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']
# Set-up commands need the network; .ci/run runs them.
SETUP = 'pip install'
# Parts of README's commands that are run before a release: they differ from the others by the values of keys alone, and
# a whole sweep is run in tests/sweeps.
VARIANTS = (
    '=lsq_plus', ':bits=4,plan=none', '.depth=14', 'digits_smoke', 'runs/seeds', 'runs/rules', 'my_estimator.py',
    'device_count=4',
)  # fmt: skip


def blocks(language):
    for page in PAGES:
        for number, text in enumerate(re.findall(rf'^```{language}\n(.*?)^```', page.read_text(), re.S | re.M)):
            yield pytest.param(text, id=f'{page.name}-{number}')


def commands():
    for block in blocks('bash'):
        for line in block.values[0].replace('\\\n', ' ').splitlines():
            if line and not line.startswith('#') and SETUP not in line:
                # Whatever reads CIFAR-10 is evaluated on ten thousand images; the README's others are run every time.
                is_slow = ('DIR' in line and 'sweep' not in line) or not block.id.startswith('README')
                is_slow = is_slow or any(variant in line for variant in VARIANTS)
                yield pytest.param(line, id=line[:60], marks=pytest.mark.slow if is_slow else ())


SLOW_PAGES = ('wrap_your_network.md',)


@pytest.mark.parametrize(
    'page',
    [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW_PAGES else (), id=page.name) for page in PAGES],
)
def test_python_snippets_run_one_after_another(page, registries):
    names = {}
    for code in re.findall(r'^```python\n(.*?)^```', page.read_text(), re.S | re.M):
        exec(compile(code, page.name, 'exec'), names)


def test_the_first_two_commands_set_everything_up():
    first, second = [block.values[0].strip() for block in blocks('bash')][:2]
    assert first == 'python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python main.py'
    assert second.endswith('-r requirements-dev.txt && .venv/bin/python -m pytest -n 2')


def run_main(flags, environment):
    """Runs main.py on one device, or on as many as the environment says."""
    compiling = f'{ONE_DEVICE} {environment.get("XLA_FLAGS", "")}'
    run = subprocess.run(
        [sys.executable, 'main.py', *flags],
        cwd=ROOT,
        env={**os.environ, **environment, 'XLA_FLAGS': compiling},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


SHORT = (
    '--config.report=false',
    '--config.train.steps=2',
    '--config.partner.steps=2',
    '--config.partner.optimizer.warmup_steps=0',
    '--config.optimizer.warmup_steps=0',
)


@pytest.fixture(scope='module')
def trained(digits_dir, tmp_path_factory):
    """The workdir of README's first command, made short."""
    workdir = tmp_path_factory.mktemp('trained')
    run_main([f'--workdir={workdir}', f'--config.data.dir={digits_dir}', *SHORT], {})
    return workdir


@pytest.mark.parametrize('line', [*commands()])
def test_commands_run(line, tmp_path, request, digits_dir):
    words = shlex.split(line)
    environment = dict(word.split('=', 1) for word in itertools.takewhile(lambda word: word != 'python', words))
    words = words[len(environment) :]
    assert words[:2] == ['python', 'main.py'], f'not a command that this test knows how to run: {line}'
    flags = words[2:]
    sweeps = [flag.removeprefix('--config.sweep=') for flag in flags if flag.startswith('--config.sweep=')]
    if any('smoke' not in sweep for sweep in sweeps):
        # They take hours; that every run of theirs has a config, tests/sweeps checks.
        assert all((ROOT / sweep).is_file() for sweep in sweeps)
        return
    directory = digits_dir
    if any('DIR' in flag for flag in flags):
        pytest.importorskip('torch', reason='PyTorch, which reads the weights, is not installed')
        shared = request.getfixturevalue('shared_data')
        directory = str(shared / 'tfds')
        weights = str(shared / 'weights' / 'cifar10_resnet20_optionA.th')
        flags = [flag.replace('=FILE', f'={weights}') for flag in flags if '=DIR' not in flag]
        flags += ['--config.data.on_device=false', '--config.quant.calibration_batches=1']
    if '--config.plugins=my_estimator.py' in flags:
        (plugin,) = [block.values[0] for block in blocks('python') if "'mine'" in block.values[0]]
        (tmp_path / 'my_estimator.py').write_text(plugin)
        flags = [flag.replace('=my_estimator.py', f'={tmp_path}/my_estimator.py') for flag in flags]
    earlier = '--config.partner.workdir=runs/digits'
    if earlier in flags:
        flags[flags.index(earlier)] = f'--config.partner.workdir={request.getfixturevalue("trained")}'
    flags = [flag for flag in flags if not flag.startswith('--workdir')]
    flags += [f'--workdir={tmp_path}', f'--config.data.dir={directory}', *SHORT]
    left = {
        '--mode=summary': 'summary.json',
        '--mode=import': 'import.json',
        '--mode=sweep': 'sweep.json',
        '--mode=evaluate': 'evaluation.json',
        '--mode=export': 'export/report.json',
        '--mode=report': 'report.html',
    }
    if not any(flag.startswith(('--mode', '--config=', '--config.network', '--config.partner')) for flag in words):
        flags.append(f'--config.partner.workdir={request.getfixturevalue("trained")}')  # the partner is the same
    if {'--mode=evaluate', '--mode=export', '--mode=report'} & set(flags):  # what it evaluates must be there
        if all(flag.startswith(('--mode', '--config.export')) for flag in words[2:]):
            shutil.copytree(request.getfixturevalue('trained'), tmp_path, dirs_exist_ok=True)
        else:
            run_main([flag for flag in flags if not flag.startswith('--mode')], environment)
    run_main(flags, environment)
    (expected,) = {left[flag] for flag in flags if flag in left} or {'result.json'}
    assert (tmp_path / expected).is_file()
    if '--mode=evaluate' in flags:
        evaluation, result = (json.loads((tmp_path / f'{name}.json').read_text()) for name in ('evaluation', 'result'))
        for key in ('top1', 'fp_top1', 'examples_evaluated', 'checkpoint_step'):
            assert evaluation[key] == result[key]
    if '--config.quant.rules' in line:
        described = (tmp_path / 'quantizers.json').read_text()
        assert 'stem/conv' not in described and 'head/dense' in described


def anchors(page):
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r'^#+ (.+)$', page.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r'\]\((?!http)([^)#]*)(?:#([^)]+))?\)', page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f'{target}#{anchor}'


@pytest.mark.parametrize('page', [page for page in PAGES if page.name != 'CHANGELOG.md'], ids=lambda page: page.name)
def test_a_page_is_read_in_one_sitting(page):
    assert len(page.read_text().splitlines()) <= (150 if page.name == 'README.md' else 250)


def test_the_index_has_every_page():
    index = (ROOT / 'docs' / 'index.md').read_text()
    for page in (ROOT / 'docs').rglob('*.md'):
        assert page.name == 'index.md' or f']({page.relative_to(ROOT / "docs").as_posix()})' in index, page


def own_names(registry):
    """Returns the names that the project registers, without those of plugins in other tests."""
    return [name for name in registry if registry.get(name).__module__.startswith('bqat_jax.')]


@pytest.mark.parametrize(('registry', 'rows'), [(ESTIMATORS, 1), (QUANTIZERS, 2)], ids=['estimators', 'quantizers'])
def test_every_name_has_its_rows(registry, rows):
    text = (ROOT / 'docs' / 'estimators.md').read_text()
    for name in own_names(registry):
        lines = re.findall(rf'^\| [^|]*`{name}[`:]', text, re.M)
        assert len(lines) == rows, f'docs/estimators.md has {len(lines)} rows for {name}, not {rows}'


def test_the_readme_counts_what_there_is():
    text = (ROOT / 'README.md').read_text()
    quantizers, estimators = own_names(QUANTIZERS), own_names(ESTIMATORS)
    (row,) = re.findall(rf'^\| quantizers \| {len(quantizers)}: (.+)$', text, re.M)
    assert all(f'`{name}`' in row for name in quantizers)
    assert f'| gradient estimators | {len(estimators)},' in text


def test_the_picture_is_drawn_from_the_functions(tmp_path):
    path = tmp_path / 'picture.png'
    subprocess.run([sys.executable, '-m', 'research.draw_estimators', str(path)], cwd=ROOT, check=True, timeout=300)
    assert path.stat().st_size > 10_000


def test_the_quantizer_of_the_docs_works(registries):
    (code,) = [block.values[0] for block in blocks('python') if "'fixed'" in block.values[0]]
    exec(compile(code, 'snippet', 'exec'), {})
    quantizer = QUANTIZERS.make('fixed:step=0.5', bits=2)
    v = jnp.array([-3.0, -0.3, 0.2, 0.3, 3.0])
    y, pullback = jax.vjp(lambda v: quantizer.fake_quantize(quantizer.init(v), v), v)
    np.testing.assert_array_equal(y, [-1.0, -0.5, 0.0, 0.5, 0.5])
    np.testing.assert_array_equal(pullback(jnp.ones(5))[0], [0, 1, 1, 1, 0])
