"""The page of a run: its config, curves, layers and answers."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bqat_jax.replacement.tasks import Metric
from bqat_jax.report import figures
from bqat_jax.report.answers import Answers, Unavailable
from bqat_jax.report.measuring import Look
from bqat_jax.report.page import Html, element, facts, folded, grid, image, note, page, part, section, table, warning

# The most histograms of layers on a page, and their largest size in bytes.
MOST_LAYERS = 150
MOST_BYTES = 3_000_000
# The most classes for which the confusion matrix is drawn; otherwise the most frequent confusions are listed.
MOST_DRAWN = 25
MOST_CONFUSIONS = 30
# The most blocks whose features are compared on the page.
MOST_BLOCKS = 60
PHASES = {'train': 'Training of the low-precision network', 'pretrain': 'Training of the full-precision partner'}
VALIDATION = 'validation_'
OF_LINE = ('phase', 'step')


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of a run's files.

    Attributes:
        name: name of the recipe.
        workdir: the run's workdir.
        seeds: seeds of the low-precision networks.
        score: the metric by which checkpoints are selected.
        overrides: keys of the recipe that the command line changed.
        changes: (key, value in the base config, value in the run's config) for all keys that differ.
        environment: versions, platform and devices; see `environment.json`.
        metrics: the lines of `metrics.jsonl`.
        result: `result.json`; None for a run that has not finished.
        summary: `summary.json`; None if it does not exist.
        oscillating: fraction of oscillating weights by layer path; empty if it was not measured.
        notes: sentences on files that could not be read.
    """

    name: str
    workdir: str
    seeds: Sequence[int]
    score: Metric
    overrides: Mapping[str, Any]
    changes: Sequence[tuple[str, Any, Any]]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    oscillating: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Features of the LP network compared with the partner's.

    Attributes:
        cka: (blocks, blocks), row LP, column FP.
        examples: number of examples compared.
    """

    cka: np.ndarray
    examples: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of the selected checkpoint; each function is called once, and may raise `Unavailable`.

    Attributes:
        looks: returns the measurements of quantizers by layer path and role.
        alignment: returns the similarity of features.
        answers: returns the answers on the test split.
        classes: names of the classes; numbers if the data set has no names.
    """

    looks: Callable[[], Mapping[str, Mapping[str, Look]]]
    alignment: Callable[[], Alignment]
    answers: Callable[[], Answers]
    classes: Sequence[str]


def run_page(record: Record, measured: Measured) -> str:
    """Returns the page of a run, HTML.

    Args:
        record: the content of the run's files.
        measured: measurements of its network.
    """
    looks = functools.cache(measured.looks)
    answers = functools.cache(measured.answers)
    sections = [
        section('Config and environment', lambda: what_was_run(record)),
        *(
            section(title, functools.partial(_curves, record, phase))
            for phase, title in PHASES.items()
            if phase == 'train' or any(line.get('phase') == phase for line in record.metrics)
        ),
        section('Layers', lambda: _layers(record, looks)),
        section('Weights and inputs by layer', lambda: _histograms(looks())),
        section('Features against the partner', lambda: _alignment(measured.alignment())),
        section('Confusion matrix', lambda: _confusion(answers(), measured.classes)),
        section('Most confidently wrong', lambda: _wrong(answers(), measured.classes)),
    ]
    return page(f'{record.name}: run', part(lambda: [_lead(record)]), sections)


def show(value: float | None, metric: Metric) -> str:
    """Formats a value of a metric; fractions are in percent."""
    if value is None or not isinstance(value, int | float):
        return 'unknown'
    if not math.isfinite(value):
        return str(value)
    return f'{100 * value:.2f} %' if metric.is_fraction else f'{value:.4g}'


def _lead(record: Record) -> Html:
    result, name = record.result, record.score.name
    parts = [note(f'In {record.workdir}')]
    if result is None:
        parts.append(warning('The run has not finished: there is no result.json. This page shows the results so far.'))
        return Html('\n'.join([*parts, *map(warning, record.notes)]))
    values = [
        (f'{record.score.title}, low precision', show(result.get(name), record.score)),
        (f'{record.score.title}, full-precision partner', show(result.get(f'fp_{name}'), record.score)),
    ]
    if f'{name}_std' in result:
        values.append((f'standard deviation of {len(record.seeds)} seeds', show(result[f'{name}_std'], record.score)))
    if f'{VALIDATION}{name}' in result:
        values.append((f'{record.score.title}, validation', show(result[f'{VALIDATION}{name}'], record.score)))
    bits = [result.get(key, '?') for key in ('weight_bits', 'activation_bits')]
    values.append(('bits of weights / inputs', f'{bits[0]} / {bits[1]}'))
    totals = (record.summary or {}).get('totals', {})
    if totals.get('bytes'):
        values.append(('size, full precision = 1', f'{totals["bytes"] / max(totals["bytes_full_precision"], 1):.3f}'))
    if isinstance(result.get('seconds'), int | float):
        values.append(('seconds of training', f'{result["seconds"]:.0f}'))
    values.append(('selected checkpoint, step', str(result.get('checkpoint_step', 'unknown'))))
    if result.get('logits_not_finite'):
        parts.append(warning(f'{result["logits_not_finite"]} test examples have outputs that are NaN or infinite.'))
    return Html('\n'.join([*parts, facts(values), *map(warning, record.notes)]))


def what_was_run(record: Record) -> Iterator[Html]:
    """Yields the config, versions, hardware and seeds of a run."""
    if record.overrides:
        rows = [(key, value_of(value)) for key, value in record.overrides.items()]
        yield note('Changes of the recipe on the command line:')
        yield table(['key', 'value'], rows)
    else:
        yield note(f'The recipe {record.name} without changes on the command line.')
    if record.changes:
        rows = [(key, value_of(old), value_of(new)) for key, old, new in record.changes]
        yield folded(f'Keys that differ from the base config: {len(rows)}', table(['key', 'base', 'here'], rows))
    yield from environment(record.environment, record.seeds)


def environment(facts_of: Mapping[str, Any], seeds: Sequence[Any]) -> Iterator[Html]:
    """Yields versions, hardware and seeds.

    Args:
        facts_of: content of `environment.json`; empty if it does not exist.
        seeds: seeds of the run or runs.
    """
    rows = [('seeds', ', '.join(map(str, seeds)))]
    devices = collections.Counter(map(str, facts_of.get('devices', ())))
    rows.append(('devices', ', '.join(f'{count} x {name}' for name, count in devices.items()) or 'unknown'))
    rows.append(('platform', str(facts_of.get('platform', 'unknown'))))
    versions = {'python': facts_of.get('python', 'unknown'), **facts_of.get('versions', {})}
    rows.append(('versions', ', '.join(f'{name} {version}' for name, version in versions.items())))
    if facts_of.get('plugins'):
        plugins = facts_of['plugins'].items()
        rows.append(('plugins', ', '.join(f'{file} (SHA-256 {digest[:12]})' for file, digest in plugins)))
    if facts_of.get('data_set'):
        rows.append(('data set', value_of(facts_of['data_set'])))
    if facts_of.get('xla_flags'):
        rows.append(('XLA_FLAGS', facts_of['xla_flags']))
    yield table(['', ''], rows)


def value_of(value: Any) -> str:
    """Formats a value of a config."""
    return 'unset' if value is None else value if isinstance(value, str) else repr(value)


def _curves(record: Record, phase: str) -> Iterator[Html]:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for entry in record.metrics:
        if entry.get('phase') != phase:
            continue
        for name, value in entry.items():
            if name not in OF_LINE and isinstance(value, int | float):
                steps, values = lines.setdefault(name, ([], []))
                steps.append(entry['step'])
                values.append(value)
    if not lines:
        raise Unavailable('metrics.jsonl has no line of this phase: it made no step here.')
    left = dict(lines)

    def take(chooses):
        return {name: left.pop(name) for name in list(left) if chooses(name)}

    percent = {'factor': 100, 'unit': '%'} if record.score.is_fraction else {}
    score = record.score.name
    groups: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ('losses', take(lambda name: name == 'loss' or name.startswith('loss/')), {}),
        (record.score.title, take(lambda name: name in (f'train_{score}', f'{VALIDATION}{score}')), percent),
        ('learning rate', take(lambda name: 'learning_rate' in name), {}),
        ('norms', take(lambda name: name.startswith('l2_')), {}),
        ('examples per second', take(lambda name: name == 'examples_per_second'), {}),
    ]
    take(lambda name: name == 'seconds')
    groups += [(name.replace('_', ' '), {name: line}, {}) for name, line in left.items()]
    drawings = [
        figures.curves(
            f'{phase} {title}', title, {name.removeprefix('loss/'): line for name, line in own.items()}, **how
        )
        for title, own, how in groups
        if own
    ]
    yield grid(itertools.chain(*drawings))


def _layers(record: Record, looks: Callable[[], Any]) -> Iterator[Html]:
    if record.summary is None:
        raise Unavailable('There is no summary.json. Use --mode=summary in this workdir.')
    seen: Mapping[str, Any] = {}

    def look():
        nonlocal seen
        seen = looks()
        yield Html('')

    missing = part(look)
    header = ['layer', 'block', 'kernel', 'weights', 'input', 'parameters', 'BitOPs']
    numbers = ['parameters', 'BitOPs']
    if seen:
        more = ['SNR weights, dB', 'SNR input, dB', 'clipped weights', 'clipped input']
        header, numbers = header + more, numbers + more
    if record.oscillating:
        header, numbers = [*header, 'oscillating'], [*numbers, 'oscillating']
    rows = []
    for layer in record.summary['layers']:
        path = layer['path']
        cells = [
            path,
            layer['block'],
            f'{layer["kind"]} {"x".join(map(str, layer["kernel"]))}',
            layer['weights'] or 'full precision',
            layer['activations'] or 'full precision',
            f'{layer["parameters"]:,}',
            _magnitude(layer['bitops']),
        ]
        if seen:
            own = [seen.get(path, {}).get(role) for role in ('weights', 'activations')]
            cells += ['' if one is None else f'{one.snr:.1f}' for one in own]
            cells += ['' if one is None else f'{one.clipped:.2%}' for one in own]
        if record.oscillating:
            cells.append(f'{record.oscillating[path]:.2%}' if path in record.oscillating else '')
        rows.append(cells)
    yield table(header, rows, numbers=numbers)
    totals = record.summary['totals']
    share = totals['bitops'] / max(totals['bitops_full_precision'], 1)
    yield note(
        f'Total: {totals["parameters"]:,} parameters; {_magnitude(totals["bitops"])} BitOPs, {share:.2%} of full '
        f'precision; {totals["bytes"]:,} bytes, {totals["bytes_full_precision"]:,} in full precision. BitOPs are '
        'multiply-accumulates times bits of the weights times bits of the input, for one example.'
    )
    yield missing
    if not record.oscillating:
        yield note(
            'Oscillating weights were not measured. Use --mode=diagnose, or quant.oscillations.freezing in a run.'
        )
    for path, reason in list(record.summary.get('not_quantizable', {}).items())[:MOST_LAYERS]:
        yield note(f'Not quantized: {path}: {reason}.')


def _magnitude(number: float) -> str:
    for size, letter in ((10**12, 'T'), (10**9, 'G'), (10**6, 'M'), (10**3, 'k')):
        if number >= size:
            return f'{number / size:.2f} {letter}'
    return f'{number:g}'


def _histograms(looks: Mapping[str, Mapping[str, Look]]) -> Iterator[Html]:
    if not looks:
        raise Unavailable('No layer has a quantizer.')
    drawn: list[Html] = []
    size = 0
    for number, (path, roles) in enumerate(looks.items()):
        if number >= MOST_LAYERS or size > MOST_BYTES:
            break
        drawing = figures.layer(f'layer {number}', path, roles)
        drawn.append(element('figure', element('figcaption', element('b', path)), Html(drawing.svg)))
        size += len(drawing.svg)
    yield note(
        'Left: weights by code. Right: inputs for a batch of test examples, relative to the lowest and the highest '
        'level of their quantizer (dashed), beyond which they are clipped. Heights on the right are square roots of '
        'fractions; the outermost bars hold all values beyond.'
    )
    yield element('div', *drawn, class_='grid')
    if len(drawn) < len(looks):
        yield note(f'The first {len(drawn)} of {len(looks)} layers, to limit the size of the page.')


def _alignment(alignment: Alignment) -> Iterator[Html]:
    matrix = alignment.cka[:MOST_BLOCKS, :MOST_BLOCKS]
    labels = [str(number) for number in range(1, len(matrix) + 1)]
    drawing = figures.matrix('cka', 'linear CKA', matrix, (labels, labels), ('LP block', 'FP block'))
    diagonal = ', '.join(f'{value:.3f}' for value in np.diag(matrix))
    yield grid([drawing])
    yield note(f'Block by block, LP against FP: {diagonal}.')
    yield note(
        f'Linear CKA of the features at the ends of blocks, on {alignment.examples} test examples: '
        '‖YᵀX‖² / (‖XᵀX‖ · ‖YᵀY‖) of centred features, which is 1 if one is a rotation and scaling of the other '
        '(Kornblith et al. 2019, arXiv:1905.00414). It is larger with fewer examples.'
    )
    if not np.all(np.isfinite(matrix)):
        yield warning('Empty cells: features that are NaN or infinite.')
    if len(alignment.cka) > len(matrix):
        yield note(f'The first {len(matrix)} of {len(alignment.cka)} blocks.')


def _confusion(answers: Answers, classes: Sequence[str]) -> Iterator[Html]:
    confusion = answers.confusion
    total, right = int(confusion.sum()), int(np.trace(confusion))
    if total == 0:
        raise Unavailable('There are no answers: every output is NaN or infinite, or every label is ignored.')
    yield note(f'{answers.examples:,} test examples, {total:,} answers, {right / total:.2%} of them right.')
    if len(confusion) == 1:
        yield note('There is only one class.')
    elif len(confusion) <= MOST_DRAWN:
        labels = [str(name) for name in classes]
        drawing = figures.matrix('confusion', 'confusion matrix', confusion, (labels, labels), ('label', 'answer'))
        yield grid([drawing])
    else:
        off = confusion - np.diag(np.diag(confusion))
        order = np.argsort(-off, axis=None, kind='stable')[:MOST_CONFUSIONS]
        pairs = [np.unravel_index(place, off.shape) for place in order]
        rows = [
            (classes[label], classes[answer], f'{off[label, answer]:,}', f'{off[label].sum():,}')
            for label, answer in pairs
            if off[label, answer] > 0
        ]
        yield note(f'The most frequent confusions of {len(confusion)} classes.')
        yield table(['label', 'answer', 'times', 'wrong of this label'], rows, numbers=['times', 'wrong of this label'])


def _wrong(answers: Answers, classes: Sequence[str]) -> Iterator[Html]:
    wrong = answers.most_confident
    if not wrong:
        counted = answers.confusion.sum()
        if counted and counted == np.trace(answers.confusion):
            raise Unavailable('No answer is wrong.')
        raise Unavailable('Only images with one label each are shown, and the test data has none.')
    shown = []
    for one in wrong:
        label, answer = classes[one.label], classes[one.answer]
        text = f'{label}, classified as {answer}'
        caption = element('figcaption', element('b', answer), f' {one.confidence:.1%}', Html('<br>'), f'is {label}')
        shown.append(element('figure', image(one.image, text), caption))
    yield note(f'The {len(shown)} most confident wrong answers: answer, confidence and label.')
    yield element('div', *shown, class_='wrong')
