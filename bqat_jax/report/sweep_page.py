"""The page of a sweep: every seed, means and intervals, paired differences, costs and choices."""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bqat_jax.replacement.tasks import Metric
from bqat_jax.report import figures
from bqat_jax.report.answers import Unavailable
from bqat_jax.report.page import Html, folded, grid, note, page, part, section, table, warning
from bqat_jax.report.run_page import environment, show, value_of

Interval = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class SweepRecord:
    """The results of a sweep.

    Attributes:
        name: name of the sweep.
        workdir: workdir of the sweep.
        baseline: the method that others are compared with.
        settings: rows of `sweep.json` by setting and method.
        metric: the metric to compare.
        validation: name of the metric on the validation split.
        intervals: (mean, low, high) over seeds by setting and method, NaN for no interval; None without results.
        definition: overrides in the sweep's file: (setting or method, its name, key, value); None if unknown.
        seeds: seeds of the comparison.
        changes: (key, value in the base config, value in the config of all runs).
        environment: versions, platform and devices of a run; empty if no run has them.
    """

    name: str
    workdir: str
    baseline: str
    settings: Mapping[str, Mapping[str, Any]]
    metric: Metric
    validation: str
    intervals: Mapping[str, Mapping[str, Interval | None]]
    definition: Sequence[tuple[str, str, str, Any]] | None
    seeds: Sequence[str]
    changes: Sequence[tuple[str, Any, Any]]
    environment: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Position:
    """The position of a selected value on its grid.

    Attributes:
        key: key of the config.
        value: the selected value.
        grid: all candidates, in ascending order if they are numbers.
        steps: distance from the nearer end of the grid; None if values have no order.
    """

    key: str
    value: Any
    grid: tuple[Any, ...]
    steps: int | None

    @property
    def is_at_edge(self) -> bool:
        """Whether it is the smallest or the largest candidate."""
        return self.steps == 0


def positions(choice: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]) -> list[Position]:
    """Returns the position of a choice for every key in which candidates differ.

    Args:
        choice: the selected overrides.
        candidates: all overrides to choose from.
    """
    results = []
    for key, value in choice.items():
        values: list[Any] = []
        for candidate in candidates:
            if key in candidate and candidate[key] not in values:
                values.append(candidate[key])
        if len(values) < 2:
            continue
        steps = None
        if all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
            values.sort()
            place = values.index(value) if value in values else 0
            steps = min(place, len(values) - 1 - place)
        results.append(Position(key, value, tuple(values), steps))
    return results


def sweep_page(record: SweepRecord) -> str:
    """Returns the page of a sweep, HTML."""
    sections = [
        section('Config and environment', lambda: _what_was_run(record)),
        section('Every seed', lambda: _seeds(record)),
        section(f'Paired differences to {record.baseline}', lambda: _differences(record)),
        section('Cost', lambda: _cost(record)),
        section('Choices', lambda: _choices(record)),
    ]
    return page(f'{record.name}: sweep', part(lambda: [_lead(record)]), sections)


def _lead(record: SweepRecord) -> Html:
    rows = [row for methods in record.settings.values() for row in methods.values()]
    runs, failed = sum(row.get('runs', 0) for row in rows), [one for row in rows for one in row.get('failed', ())]
    parts = [note(f'In {record.workdir}'), note(f'{runs} runs, {len(failed)} of them failed.')]
    edges = [
        f'{setting}, {method}: {one.key} {one.value:g}'
        for setting, method, one in _all_positions(record)
        if one.is_at_edge
    ]
    if edges:
        parts.append(warning(f'Chosen at the edge of the grid, a better value may be beyond: {"; ".join(edges)}.'))
    for one in failed:
        first = str(one.get('error', '')).partition('\n')[0][:300]
        parts.append(warning(f'Failed: {one.get("workdir", "a run")}: {first}'))
    return Html('\n'.join(parts))


def _what_was_run(record: SweepRecord) -> Iterator[Html]:
    if record.definition is None:
        yield note('The overrides of methods and settings are shown with --config.sweep=FILE, which was not set.')
    elif record.definition:
        rows = [(kind, name, key, value_of(value)) for kind, name, key, value in record.definition]
        yield table(['part', 'name', 'key', 'value'], rows)
    if record.changes:
        rows = [(key, value_of(old), value_of(new)) for key, old, new in record.changes]
        yield folded(f'Keys that differ from the base config: {len(rows)}', table(['key', 'base', 'here'], rows))
    if not record.environment:
        yield note('Versions and devices are unknown: there is no environment.json.')
    yield from environment(record.environment, record.seeds)


def _unit(metric: Metric) -> tuple[float, str]:
    return (100.0, f'{metric.title}, %') if metric.is_fraction else (1.0, metric.title)


def _seeds(record: SweepRecord) -> Iterator[Html]:
    (factor, unit), name = _unit(record.metric), record.metric.name
    drawings, rows = [], []
    for number, (setting, methods) in enumerate(record.settings.items()):
        values = {m: [factor * score[name] for score in row['by_seed'].values()] for m, row in methods.items()}
        own = record.intervals[setting]
        intervals = {m: None if x is None else tuple(factor * one for one in x) for m, x in own.items()}
        drawings.append(figures.dots(f'seeds {number}', setting, values, intervals, unit))
        for method, row in methods.items():
            interval = own[method]
            spread = '' if row.get('std') is None else _number(row['std'], record.metric)
            rows.append(
                (
                    setting,
                    method,
                    str(len(values[method])),
                    'failed' if interval is None else show(interval[0], record.metric),
                    spread,
                    _between(interval, record.metric),
                )
            )
    if not drawings:
        raise Unavailable('No method has finished yet.')
    yield grid(drawings)
    yield note(
        "Dots: seeds, on the test split. Diamond and line: their mean and its 95 % interval (Student's t)."
        + ('' if record.metric.larger_is_better else ' Smaller is better.')
    )
    header = ['setting', 'method', 'seeds', 'mean', 'standard deviation', '95 % interval']
    yield table(header, rows, numbers=header[2:])


def _differences(record: SweepRecord) -> Iterator[Html]:
    factor = _unit(record.metric)[0]
    unit = 'percentage points' if record.metric.is_fraction else record.metric.title
    drawings, rows = [], []
    for number, (setting, methods) in enumerate(record.settings.items()):
        own = {m: row['difference'] for m, row in methods.items() if row.get('difference')}
        if not own:
            continue
        shown = {m: tuple(factor * x[key] for key in ('mean', 'low', 'high')) for m, x in own.items()}
        drawings.append(figures.differences(f'differences {number}', setting, shown, unit))
        for method, one in own.items():
            mean, low, high = (_number(one[key], record.metric, '+') for key in ('mean', 'low', 'high'))
            clear = 'no' if one['low'] <= 0 <= one['high'] else 'yes'
            rows.append((setting, method, str(one['seeds']), mean, f'{low} to {high}', clear))
    if not drawings:
        raise Unavailable(
            'No other method has two seeds in common with the baseline, so there is no difference to show.'
        )
    yield grid(drawings)
    yield note(
        "Differences paired by seed: their mean and its 95 % interval (Student's t, which assumes independent, normal "
        'differences). Grey: the interval contains 0.'
    )
    header = ['setting', 'method', 'pairs', 'mean', '95 % interval', 'excludes 0']
    yield table(header, rows, numbers=header[2:5])


def _cost(record: SweepRecord) -> Iterator[Html]:
    rows = []
    for setting, methods in record.settings.items():
        baseline = _seconds(methods.get(record.baseline, {}))
        for method, row in methods.items():
            seconds = _seconds(row)
            if seconds is None:
                rows.append((setting, method, 'failed', '', '', ''))
                continue
            relative = '' if not baseline else f'{seconds / baseline:.2f}'
            chosen = [one.get('seconds') for one in row.get('choices', ())]
            choosing = f'{sum(chosen):.0f}' if chosen and all(x is not None for x in chosen) else ''
            steps = {score['steps'] for score in row['by_seed'].values()}
            rows.append((setting, method, ', '.join(map(str, sorted(steps))), f'{seconds:.1f}', relative, choosing))
    if not rows:
        raise Unavailable('No method has finished yet.')
    header = ['setting', 'method', 'steps', 'seconds a seed', f'{record.baseline} = 1', 'seconds of choosing']
    yield table(header, rows, numbers=header[2:])
    yield note('Seconds are those of training, including compilation; seeds in parallel share theirs.')


def _seconds(row: Mapping[str, Any]) -> float | None:
    seconds = [score['seconds'] for score in row.get('by_seed', {}).values()]
    return statistics.mean(seconds) if seconds else None


def _choices(record: SweepRecord) -> Iterator[Html]:
    if not any(row.get('choices') for methods in record.settings.values() for row in methods.values()):
        raise Unavailable('Methods were run as they are: the sweep has no choices.')
    rows = []
    for setting, method, one in _all_positions(record):
        if one.steps is None:
            where = 'values have no order'
        elif one.is_at_edge:
            where = 'at the edge'
        else:
            where = f'{one.steps} from the edge'
        cell = Html(f'<span class="warn">{where}</span>') if one.is_at_edge else where
        added = _added_values(record.settings[setting][method], one.key)
        values = ', '.join(f'{value_of(x)} (added)' if x in added else value_of(x) for x in one.grid)
        rows.append((setting, method, one.key, value_of(one.value), values, cell))
    yield table(['setting', 'method', 'key', 'selected', 'candidates', 'position'], rows)
    yield grid(_choice_drawings(record))
    yield note(
        f'The choice with the best mean on held-out training images is selected (ringed): {record.metric.title}, on '
        'seeds that are not compared. If it was at the edge of the grid, choices beyond were added, at most '
        'sweep_extend of them. If it is still at the edge, a better value may be beyond: extend the grid.'
    )


def _choice_drawings(record: SweepRecord) -> Iterator[figures.Drawing]:
    """A figure for each setting, over the first key with numbers."""
    factor, unit = _unit(record.metric)
    for number, (setting, methods) in enumerate(record.settings.items()):
        lines: dict[str, Any] = {}
        taken, key = {}, ''
        for method, row in methods.items():
            ordered = [one for one in positions(row.get('choice') or {}, _candidates(row)) if one.steps is not None]
            if not ordered:
                continue
            key = key or ordered[0].key
            points: dict[float, float] = {}
            for one in row['choices']:
                scores = [score for score in one.get(record.validation, ()) if math.isfinite(score)]
                if scores and key in one['overrides']:
                    value, mean = one['overrides'][key], factor * statistics.mean(scores)
                    best = max if record.metric.larger_is_better else min
                    points[value] = mean if value not in points else best(points[value], mean)
            lines[method] = (sorted(points), [points[value] for value in sorted(points)])
            taken[method] = row['choice'].get(key)
        if lines:
            yield figures.choices(f'choices {number}', setting, lines, taken, (key, f'validation {unit}'))


def _all_positions(record: SweepRecord) -> Iterator[tuple[str, str, Position]]:
    for setting, methods in record.settings.items():
        for method, row in methods.items():
            for one in positions(row.get('choice') or {}, _candidates(row)):
                yield setting, method, one


def _added_values(row: Mapping[str, Any], key: str) -> list[Any]:
    """The values of a key that the sweep added to its grid."""
    return [one['overrides'].get(key) for one in row.get('choices', ()) if one.get('added')]


def _candidates(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one['overrides'] for one in row.get('choices', ())]


def _number(value: float, metric: Metric, sign: str = '') -> str:
    return f'{100 * value:{sign}.2f}' if metric.is_fraction else f'{value:{sign}.4g}'


def _between(interval: Interval | None, metric: Metric) -> str:
    if interval is None or not math.isfinite(interval[1]):
        return ''
    return f'{_number(interval[1], metric)} to {_number(interval[2], metric)}'
