"""Pages from numbers that are made up: what they hold, what they must not, and how they look in a browser."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from bqat_jax.replacement.tasks import Metric
from bqat_jax.report import figures, run_page, sweep_page
from bqat_jax.report.answers import MOST_WRONG, Answers, Unavailable
from bqat_jax.report.measuring import BINS, Look
from bqat_jax.report.page import MOST_PIXELS, escaped, image
from bqat_jax.report.run_page import Alignment, Measured, Record
from bqat_jax.report.sweep_page import SweepRecord, positions

EVIL = '<script>alert("$x$")</script>'
TOP1 = Metric('top1', 'top-1', larger_is_better=True, is_fraction=True)
RANDOM = np.random.default_rng(0)


def look(bits, of_weights):
    histogram = RANDOM.integers(0, 100, 2**bits if of_weights else BINS)
    return Look(12.3, 0.01, histogram, -(2 ** (bits - 1)) if of_weights else 0, bits)


def looks(count, bits=2):
    return {f'layer{n}': {'weights': look(bits, True), 'activations': look(bits, False)} for n in range(count)}


def counts(size, right, classes=10):
    labels, answers = np.arange(size) % classes, (np.arange(size) + (0 if right else 1)) % classes
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, answers), 1)
    confidence = np.linspace(0.5, 0.9, size)
    return {
        'confusion': confusion, 'examples': size, 'label': labels, 'answer': answers, 'confidence': confidence,
        'is_wrong': labels != answers,
    }  # fmt: skip


def answered(right=False, images=True):
    answers = Answers(np.zeros((10, 10), np.int64))
    answers.add(counts(40, right), (lambda place: np.full((8, 8, 1), place, np.uint8)) if images else None)
    return answers


def record(**changes):
    metrics = [
        {'phase': phase, 'step': step, 'loss': 2 / step, 'loss/cross_entropy': 1 / step, 'learning_rate': 0.1,
         'l2_params': 3.0, 'train_top1': 1 - 1 / step, 'examples_per_second': 100.0, 'seconds': step}
        for phase in ('pretrain', 'train') for step in range(1, 60)
    ]  # fmt: skip
    row = {'path': 'layer0', 'block': 'block 1', 'kind': 'Conv', 'kernel': [3, 3, 1, 8], 'weights': 'lsq 2 bits'}
    row |= {'activations': None, 'parameters': 72, 'macs': 9, 'bitops': 10}
    totals = {'parameters': 72, 'macs': 9, 'bitops': 10, 'bitops_full_precision': 100, 'bytes': 9}
    summary = {'layers': [row], 'totals': {**totals, 'bytes_full_precision': 99}, 'not_quantizable': {}}
    result = {'top1': 0.9, 'fp_top1': 0.95, 'weight_bits': 2, 'activation_bits': 2, 'seconds': 3.0}
    environment = {'versions': {'jax': '1'}, 'devices': ['cpu'], 'platform': 'Linux', 'python': '3'}
    values = {
        'name': 'digits', 'workdir': '/runs/x', 'seeds': range(1), 'score': TOP1, 'overrides': {'seed': 1},
        'changes': [('seed', 0, 1)], 'environment': environment, 'metrics': metrics,
        'result': {**result, 'checkpoint_step': 59}, 'summary': summary,
    }  # fmt: skip
    return Record(**{**values, **changes})


def measured(**changes):
    values = {
        'looks': lambda: looks(2),
        'alignment': lambda: Alignment(np.asarray([[0.9, 0.2], [0.1, math.nan]]), 64),
        'answers': answered,
        'classes': [str(n) for n in range(10)],
    }
    return Measured(**{**values, **changes})


def sweep(**changes):
    def row(values, rates=(0.1, 0.2, 0.3), taken=0.3):
        choices = [{'overrides': {'lr': rate}, 'validation_top1': [rate], 'seconds': 1.0} for rate in rates]
        by_seed = {str(n): {'top1': value, 'seconds': 2.0, 'steps': 5} for n, value in enumerate(values)}
        return {
            'runs': 3, 'failed': [], 'choices': choices, 'choice': {'lr': taken}, 'by_seed': by_seed, 'std': 0.1,
            'mean': float(np.mean(values)), 'difference': None,
        }  # fmt: skip

    difference = {'mean': 0.1, 'low': -0.1, 'high': 0.3, 'seeds': 3}
    methods = {'LSQ': row([0.5, 0.6, 0.7]), 'other': {**row([0.6, 0.7, 0.8], taken=0.2), 'difference': difference}}
    values = {
        'name': 'sweep', 'workdir': '/runs/sweep', 'baseline': 'LSQ', 'settings': {'W2A2': methods}, 'metric': TOP1,
        'validation': 'validation_top1', 'definition': [('method', 'LSQ', 'replacement.plan', 'none')],
        'intervals': {'W2A2': {'LSQ': (0.6, 0.4, 0.8), 'other': (0.7, 0.5, 0.9)}}, 'seeds': ['0', '1', '2'],
        'changes': [], 'environment': {},
    }  # fmt: skip
    return SweepRecord(**{**values, **changes})


class Reader(html.parser.HTMLParser):
    """Notes tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open, self.ids = [], [], [], []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == 'id']
        if tag not in ('meta', 'img', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page):
    """Every page: well formed, nothing that runs, nothing that is loaded, names unique and found."""
    reader = Reader(page)
    assert not {'script', 'iframe', 'object', 'link', 'foreignobject'} & set(reader.tags)
    assert len(set(reader.ids)) == len(reader.ids)
    for name, value in reader.attributes:
        assert not name.startswith('on')
        if name in ('href', 'src', 'xlink:href'):
            assert value.startswith(('#', 'data:image/png;base64,'))
        if name in ('href', 'xlink:href') and value.startswith('#'):
            assert value[1:] in reader.ids
    for used in re.findall(r'url\(([^)]*)\)', page):
        assert used[0] == '#' and used[1:] in reader.ids
    without_namespaces = re.sub(r' xmlns(:\w+)?="[^"]*"', '', page)
    assert 'http://' not in without_namespaces and 'https://' not in without_namespaces
    return page


def test_the_page_of_a_run_has_all_parts_and_is_the_same_each_time():
    seen, wrong = looks(2), answered()
    page = check(run_page.run_page(record(), measured(looks=lambda: seen, answers=lambda: wrong)))
    assert page == run_page.run_page(record(), measured(looks=lambda: seen, answers=lambda: wrong))
    for text in ('90.00 %', '95.00 %', 'cross_entropy', 'learning rate', 'layer0', 'arXiv:1905.00414', 'layer1'):
        assert text in page
    assert page.count('<img') == MOST_WRONG and 'could not be made' not in page


def test_drawings_are_deterministic():
    one = look(4, True)
    assert figures.layer('a', 'b', {'weights': one}) == figures.layer('a', 'b', {'weights': one})
    lines = {'loss': ([1, 2, 3], [3.0, 2.0, 1.0])}
    assert figures.curves('a', 'b', lines) == figures.curves('a', 'b', lines)
    svg = figures.layer('a', 'b', looks(1)['layer0']).svg
    assert not re.search('#0[0-9a]0', svg) and 'mathdefault' not in svg
    assert all(f'fill: var(--{name})' in svg for name in ('c1', 'c2', 'text'))
    assert 'date' not in figures.curves('a', 'b', lines)[0].svg.lower()


def test_what_others_wrote_is_escaped():
    row = {**record().summary['layers'][0], 'path': EVIL, 'block': EVIL, 'weights': EVIL}
    summary = {**record().summary, 'layers': [row], 'not_quantizable': {EVIL: EVIL}}
    metrics = [{'phase': 'train', 'step': n, EVIL: float(n), f'loss/{EVIL}': 1.0} for n in (1, 2)]
    evil = record(
        name=EVIL, workdir=EVIL, overrides={EVIL: EVIL}, changes=[(EVIL, EVIL, EVIL)], summary=summary,
        environment={'versions': {EVIL: EVIL}, 'devices': [EVIL], 'platform': EVIL, 'plugins': {EVIL: EVIL}},
        metrics=metrics, score=Metric('top1', EVIL, True, True), oscillating={EVIL: 0.5}, notes=[EVIL],
    )  # fmt: skip
    page = check(run_page.run_page(evil, measured(classes=[EVIL] * 10, looks=lambda: {EVIL: looks(1)['layer0']})))
    assert '<script' not in page and 'could not be made' not in page
    methods = {EVIL: next(iter(sweep().settings['W2A2'].values()))}
    failed = {**methods[EVIL], 'failed': [{'workdir': EVIL, 'error': EVIL}]}
    intervals = {EVIL: {EVIL: (0.6, 0.4, 0.8)}}
    evil_sweep = sweep(name=EVIL, baseline=EVIL, settings={EVIL: {EVIL: failed}}, intervals=intervals)
    page = check(sweep_page.sweep_page(evil_sweep))
    assert '<script' not in page and 'could not be made' not in page
    assert escaped('a\x00<b') == 'a&lt;b'


def fail():
    raise RuntimeError('broken <b>')


def unavailable():
    raise Unavailable('There is none.')


@pytest.mark.parametrize(
    ('changes', 'parts', 'text'),
    [
        ({'result': None}, {}, 'has not finished'),
        ({'summary': None}, {}, '--mode=summary'),
        ({'metrics': []}, {}, 'made no step'),
        ({}, {'looks': fail}, 'RuntimeError: broken &lt;b&gt;'),
        ({}, {'looks': unavailable, 'alignment': unavailable, 'answers': unavailable}, 'There is none.'),
        ({}, {'looks': dict}, 'No layer has a quantizer'),
        ({}, {'answers': lambda: Answers(np.zeros((10, 10), np.int64))}, 'There are no answers'),
        ({}, {'answers': lambda: answered(right=True)}, 'No answer is wrong'),
        ({}, {'answers': lambda: answered(images=False)}, 'Only images'),
        ({}, {'answers': lambda: Answers(np.full((1, 1), 3), 3), 'classes': ['only']}, 'only one class'),
        ({}, {'answers': lambda: Answers(np.ones((40, 40), np.int64), 3), 'classes': range(40)}, 'most frequent confu'),
        ({'metrics': [{'phase': 'train', 'step': 1, 'loss': math.nan}]}, {}, 'Not finite'),
        ({'result': {'top1': math.nan}}, {}, 'nan'),
        ({'result': {'top1': 0.5}, 'summary': {'totals': {'bytes': 1}}}, {}, 'KeyError'),
        ({'oscillating': {'layer0': 0.25}}, {}, '25.00%'),
    ],
)
def test_a_part_that_cannot_be_made_says_why(changes, parts, text):
    nothing = dict.fromkeys(('looks', 'alignment', 'answers'), unavailable)
    page = check(run_page.run_page(record(**{'metrics': [], **changes}), measured(**{**nothing, **parts})))
    assert text in page and page.count('<h2') >= 6


def test_a_network_with_very_many_layers_keeps_the_page_small(monkeypatch):
    monkeypatch.setattr(run_page, 'MOST_LAYERS', 5)
    page = check(run_page.run_page(record(), measured(looks=lambda: looks(9, bits=8))))
    assert 'The first 5 of 9 layers' in page
    size = len(figures.layer('a', 'b', looks(1, bits=8)['layer0']).svg)
    assert size < 13_000, 'a hundred layers would not fit a page of some megabytes'


def test_images_of_any_kind_are_embedded_small():
    for pixels in (np.zeros((300, 200, 3), np.uint8), np.ones((8, 8, 1), np.float32), np.full((4, 4, 5), np.nan)):
        text = image(pixels, '"<')
        assert text.startswith('<img src="data:image/png;base64,') and 'alt="&quot;&lt;"' in text
    assert len(image(RANDOM.integers(0, 255, (300, 300, 3)).astype(np.uint8), '')) < 5 * MOST_PIXELS**2


def test_the_most_confident_wrong_answers_stay():
    answers = Answers(np.zeros((10, 10), np.int64))
    for part in range(3):
        own = counts(20, right=False)
        own['confidence'] = own['confidence'] - part
        answers.add(own, lambda place: np.zeros((1, 1, 1), np.uint8))
    kept = [wrong.confidence for wrong in answers.most_confident]
    assert len(kept) == MOST_WRONG and kept == sorted(kept, reverse=True)
    assert kept[:20] == pytest.approx(np.linspace(0.9, 0.5, 20)) and answers.examples == 60
    assert answers.confusion.sum() == 60


def test_the_page_of_a_sweep_flags_a_choice_at_the_edge():
    page = check(sweep_page.sweep_page(sweep()))
    assert 'Chosen at the edge of the grid' in page and 'W2A2, LSQ: lr 0.3' in page and 'W2A2, other' not in page
    for text in ('60.00 %', '+10.00', '-10.00 to +30.00', 'at the edge', '1 from the edge', 'seconds a seed'):
        assert text in page
    assert 'could not be made' not in page
    plain = {m: {**row, 'choices': [], 'choice': {}} for m, row in sweep().settings['W2A2'].items()}
    assert 'the sweep has no choices' in check(sweep_page.sweep_page(sweep(settings={'W2A2': plain})))


def test_a_sweep_in_which_all_failed_says_so():
    failed = {'runs': 1, 'failed': [{'workdir': 'a', 'error': 'ValueError: b'}], 'choices': [], 'by_seed': {}}
    failed |= {'choice': None, 'std': None, 'mean': None, 'difference': None}
    page = check(sweep_page.sweep_page(sweep(settings={'s': {'LSQ': failed}}, intervals={'s': {'LSQ': None}})))
    assert 'Failed: a: ValueError: b' in page and 'could not be made' not in page
    assert 'No method has finished' in sweep_page.sweep_page(sweep(settings={}, intervals={}))


def test_where_a_choice_lies_on_its_grid():
    candidates = [{'lr': rate, 'estimator': name, 'same': 1} for rate in (0.3, 0.1, 0.2) for name in ('a', 'b')]
    lr, estimator = positions({'lr': 0.2, 'estimator': 'a', 'same': 1}, candidates)
    assert lr.grid == (0.1, 0.2, 0.3) and lr.steps == 1 and not lr.is_at_edge
    assert estimator.steps is None and not estimator.is_at_edge
    assert positions({'lr': 0.1}, candidates)[0].is_at_edge
    assert positions({}, candidates) == []


PROBE = """<script>
const errors = []; window.addEventListener('error', e => errors.push(String(e.message)));
window.addEventListener('load', () => { const d = document.documentElement;
  document.title = JSON.stringify({scroll: d.scrollWidth, client: d.clientWidth, errors,
    violations: window.violations || []}); });
document.addEventListener('securitypolicyviolation', e => (window.violations ||= []).push(e.violatedDirective));
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize('width', [400, 1400])
@pytest.mark.parametrize('kind', ['run', 'sweep'])
def test_in_a_browser_nothing_runs_over_the_page(kind, width, tmp_path):
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if chromium is None:
        pytest.skip('Chromium is not installed')
    long = 'a_name_that_is_much_longer_than_a_narrow_page_is_wide/' * 3
    if kind == 'run':
        named = dataclasses.replace(record(overrides={long: long}, workdir=long), name=long)
        page = run_page.run_page(named, measured(looks=lambda: {long: looks(1)['layer0']}, classes=[long] * 10))
    else:
        methods = {f'{name} {long}': row for name, row in sweep().settings['W2A2'].items()}
        intervals = {long: dict.fromkeys(methods, (0.6, 0.4, 0.8))}
        page = sweep_page.sweep_page(sweep(settings={long: methods}, intervals=intervals))
    # The probe needs a script, which the page's own policy forbids: here inline scripts alone are let in.
    probed = page.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    # A window of Chromium is at least 500 pixels wide: the page is looked at within a frame.
    (tmp_path / 'page.html').write_text(probed.replace('</head>', f'{PROBE}</head>'))
    frame = f'<iframe id="f" src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    told = '<script>onload=()=>setTimeout(()=>{document.body.textContent=f.contentDocument.title},200)</script>'
    (tmp_path / 'frame.html').write_text(f'<body>{frame}{told}</body>')
    run = subprocess.run(
        [
            chromium, '--headless', '--no-sandbox', '--disable-gpu', '--allow-file-access-from-files', '--dump-dom',
            '--virtual-time-budget=5000', f'--window-size={width + 200},1000', f'--user-data-dir={tmp_path}/user',
            f'file://{tmp_path}/frame.html',
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    found = json.loads(html.unescape(re.search(r'<body>(\{.*\})</body>', run.stdout, re.S)[1]))
    assert found['scroll'] <= found['client'] <= width
    assert found['errors'] == [] and found['violations'] == []
