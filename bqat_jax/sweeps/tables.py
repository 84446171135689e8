"""The tables and the plot of a sweep."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from scipy import stats

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, local_files, plugin_files
from bqat_jax.experiment.metrics import VALIDATION
from bqat_jax.experiment.run import PARTNER
from bqat_jax.registry import load_plugins
from bqat_jax.replacement.tasks import Metric, get_task
from bqat_jax.storage import Place, write_bytes, write_json, write_text
from bqat_jax.sweeps.choices import is_added
from bqat_jax.sweeps.definition import Sweep

CONFIDENCE = 0.95
TABLES = 'sweep.json'
# Mark of a choice that the sweep added to its grid.
ADDED = 'added'


def metric_of(config: Config) -> Metric:
    """Returns the metric to compare: the score of a config's task.

    Raises:
        UserError: for an unknown task.
    """
    load_plugins(local_files(plugin_files(config)))  # a plugin may register the task
    try:
        return get_task(config.task).score
    except ValueError as error:
        raise UserError(str(error)) from error


def paired_difference(values: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float] | None:
    """Returns mean and 95 % confidence interval of the differences between two methods, paired by seed.

    Student's t interval assumes independent, normal differences. Seeds that one method lacks are left out.

    Returns:
        {'mean', 'low', 'high', 'seeds'}; None for fewer than two common seeds.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if len(differences) < 2:
        return None
    mean, low, high = student_interval(differences)
    return {'mean': mean, 'low': low, 'high': high, 'seeds': len(differences)}


def student_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of at least two values and its Student's t 95 % confidence interval: (mean, low, high)."""
    mean = statistics.mean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def write_tables(workdir: Place, sweep: Sweep, entries: Mapping[str, Mapping[str, Any]], metric: Metric) -> None:
    """Writes `sweep.json`, `sweep.csv`, `sweep.md` and `sweep.png`.

    Args:
        workdir: folder of the files.
        sweep: the sweep.
        entries: results by setting and method, see `bqat_jax.sweeps.execution`.
        metric: the metric to compare.
    """
    rows = {setting: _summarize(sweep, methods, metric.name) for setting, methods in entries.items()}
    write_json(workdir / TABLES, {'baseline': sweep.baseline, 'settings': rows})
    write_text(workdir / 'sweep.csv', _csv(entries, metric.name))
    write_text(workdir / 'sweep.md', _markdown(sweep, rows, metric))
    write_bytes(workdir / 'sweep.png', _plot(rows, metric))


def _summarize(sweep: Sweep, methods: Mapping[str, Any], metric: str) -> dict[str, Any]:
    def values_of(entry):
        return {seed: score[metric] for seed, score in entry['by_seed'].items()}

    baseline = values_of(methods.get(sweep.baseline, {'by_seed': {}}))
    rows = {}
    for name, entry in methods.items():
        values = values_of(entry)
        rows[name] = {
            **entry,
            'mean': statistics.mean(values.values()) if values else None,
            'std': statistics.stdev(values.values()) if len(values) > 1 else None,
            'difference': None if name == sweep.baseline else paired_difference(values, baseline),
        }
    return rows


def _csv(entries: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    text = io.StringIO()
    scores = (metric, f'{VALIDATION}{metric}', f'{PARTNER}{metric}')
    columns = ('setting', 'method', 'choice', 'seed', *scores, 'steps', 'seconds')
    writer = csv.DictWriter(text, columns, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    for setting, methods in entries.items():
        for method, entry in methods.items():
            for seed, score in entry['by_seed'].items():
                choice = _describe_choice(entry['choice'])
                writer.writerow({'setting': setting, 'method': method, 'choice': choice, 'seed': seed, **score})
    return text.getvalue()


def _markdown(sweep: Sweep, rows: Mapping[str, Mapping[str, Any]], metric: Metric) -> str:
    unit = ' %' if metric.is_fraction else ''
    title = f'{metric.title[0].upper()}{metric.title[1:]}'
    better = '' if metric.larger_is_better else '; smaller is better'
    against = f'against {sweep.baseline}{unit and ", %"}'
    lines = [
        f'| setting | method | chosen | seeds | steps | {metric.title}{unit} | {against} | seconds a seed |',
        '|---|---|---|---|---|---|---|---|',
    ]
    failed = []
    for setting, methods in rows.items():
        for method, row in methods.items():
            scores = list(row['by_seed'].values())
            added = f' ({ADDED})' if is_added(row, row['choice'] or {}) else ''
            cells = [setting, method, f'{_describe_choice(row["choice"])}{added}', str(len(scores))]
            if scores:
                cells += [
                    str(scores[0]['steps']),
                    _mean_and_std(row, metric),
                    _interval(row['difference'], metric),
                    f'{statistics.mean(score["seconds"] for score in scores):.0f}',
                ]
            else:
                cells += ['', 'failed', '', '']
            lines.append(f'| {" | ".join(cells)} |')
            failed += row['failed']
    lines += [
        '',
        f'{title} on the test images, mean ± standard deviation over seeds{better}. Differences are paired by seed, '
        f'with their {CONFIDENCE:.0%} interval (Student\'s t). "Chosen" was chosen on held-out '
        'training images, with other seeds.',
    ]
    if any(f'({ADDED})' in line for line in lines):
        lines.append(f'\n"{ADDED}": beyond the grid of the sweep, whose best choice was at its edge.')
    lines += [f'\nFailed: {one["workdir"]}: {_first_sentence(one["error"])}' for one in failed]
    return '\n'.join(lines) + '\n'


def _first_sentence(text: str) -> str:
    return text.splitlines()[0].partition('. ')[0] if text else text


def _describe_choice(choice: Mapping[str, Any] | None) -> str:
    parts = {f'{key.rpartition(".")[2]} {value}': None for key, value in (choice or {}).items()}
    return ', '.join(parts)


def _mean_and_std(row: Mapping[str, Any], metric: Metric) -> str:
    spread = '' if row['std'] is None else f' ± {_number(row["std"], metric)}'
    return f'{_number(row["mean"], metric)}{spread}'


def _number(value: float, metric: Metric, sign: str = '') -> str:
    """Formats a value of a metric, or a difference, for tables; fractions are in percent."""
    return f'{100 * value:{sign}.2f}' if metric.is_fraction else f'{value:{sign}.4g}'


def _interval(difference: Mapping[str, float] | None, metric: Metric) -> str:
    if difference is None:
        return ''
    mean, low, high = (_number(difference[key], metric, '+') for key in ('mean', 'low', 'high'))
    return f'{mean} ({low} to {high})'


def _plot(rows: Mapping[str, Mapping[str, Any]], metric: Metric) -> bytes:
    """Plots seeds as points and means as lines, with a panel for each setting."""
    factor, label = (100, f'{metric.title} %') if metric.is_fraction else (1, metric.title)
    size = 1.5 + 3.2 * len(rows), 1.2 + 0.35 * max(map(len, rows.values()))
    figure = Figure(figsize=size, layout='constrained')
    panels = figure.subplots(1, len(rows), squeeze=False, sharey=True)
    for panel, (setting, methods) in zip(panels[0], rows.items(), strict=True):
        names = list(methods)
        for height, row in enumerate(methods.values()):
            values = [factor * score[metric.name] for score in row['by_seed'].values()]
            panel.plot(values, [height] * len(values), 'o', color='tab:blue', alpha=0.4, markersize=4)
            if values:
                panel.plot([statistics.mean(values)] * 2, [height - 0.3, height + 0.3], color='black')
        panel.set(
            title=setting,
            xlabel=label,
            yticks=range(len(names)),
            yticklabels=names,
        )
        panel.grid(axis='x', alpha=0.3)
        panel.set_ylim(-0.6, len(names) - 0.4)
    panels[0][0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=150)
    figure.clear()  # else its arrays wait for a full garbage collection, which a large heap makes rare
    return buffer.getvalue()
