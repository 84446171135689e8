"""The figures of a report as SVG, legible on a page 400 pixels wide."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bqat_jax.report.measuring import BINS_BESIDE, BINS_INSIDE, Look
from bqat_jax.report.page import Drawing
from bqat_jax.report.svg import LINES, MARK, TEXT, draw

WIDTH = 350
# The most points of a line; more would not be visible.
MOST_POINTS = 400
# The most lines of a figure: one per colour.
MOST_LINES = len(LINES)
# Ratio of the largest to the smallest value from which a scale is logarithmic.
WIDE = 30.0
# The most rows or columns of a matrix whose cells have numbers.
MOST_NUMBERED = 12
# The most names along the side of a matrix.
MOST_TICKS = 25
# The most characters of a name on an axis.
MOST_CHARACTERS = 24

Points = tuple[Sequence[float], Sequence[float]]


def curves(name: str, title: str, lines: Mapping[str, Points], *, factor: float = 1.0, unit: str = '') -> list[Drawing]:
    """Draws lines over steps, in as many figures as needed to give each line of a figure its own colour.

    Args:
        name: name of the figure.
        title: title of the figure.
        lines: steps and values by name; values that are not finite leave a gap.
        factor: factor of the values.
        unit: unit of the values, for the title.
    """
    drawings, left = [], iter(lines.items())
    for number in itertools.count():
        own = dict(itertools.islice(left, MOST_LINES))
        if not own:
            return drawings
        scaled = {label: _thinned(points, factor) for label, points in own.items()}
        more = ', continued' if number else ''
        heading = f'{title}{f", {unit}" if unit else ""}{more}'
        svg = draw(f'{name} {number}', (WIDTH, 200), functools.partial(_plot, heading, scaled), title=title)
        drawings.append(Drawing(svg, tuple(own), _gaps(scaled)))
    raise AssertionError


def _thinned(points: Points, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` evenly spaced points, including the last."""
    steps, values = (np.asarray(x, np.float64) for x in points)
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).round().astype(int))
    return steps[chosen], factor * values[chosen]


def _gaps(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """A sentence on lines with values that are not finite."""
    names = [label for label, (_, values) in lines.items() if not np.all(np.isfinite(values))]
    return f'Not finite in some steps, and left out there: {", ".join(names)}.' if names else ''


def _plot(title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], figure: Any) -> None:
    axes = figure.subplots()
    for color, (steps, values) in zip(LINES, lines.values(), strict=False):
        shown = np.where(np.isfinite(values), values, np.nan)
        axes.plot(steps, shown, color=color, linewidth=1.4, marker='o' if len(steps) < 2 else '', markersize=4)
    everything = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])
    positive = everything[everything > 0]
    if len(everything) and len(positive) == len(everything) and positive.max() > WIDE * positive.min():
        axes.set_yscale('log')
        _plain_numbers(axes.yaxis)
    axes.set_title(title)
    axes.set_xlabel('step')
    axes.grid(True)
    axes.locator_params(axis='x', nbins=5)
    _plain_numbers(axes.xaxis)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """1200000 as '1.2M', 0.00001 as '1e-5'."""
    for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size and abs(value) >= 1e4:
            return f'{value / size:g}{letter}'
    return f'{value:g}'.replace('e-0', 'e-')


def layer(name: str, title: str, looks: Mapping[str, Look]) -> Drawing:
    """Draws the histograms of a layer: weights over their codes, inputs over their clip range.

    Args:
        name: name of the figure.
        title: the layer's path.
        looks: measurements of its quantizers by role.
    """
    kinds = [role for role in ('weights', 'activations') if role in looks]

    def paint(figure):
        margins = {'left': 0.02, 'right': 0.98, 'bottom': 0.28, 'top': 0.84, 'wspace': 0.06}
        panels = figure.subplots(1, len(kinds), squeeze=False, gridspec_kw=margins)[0]
        for axes, role in zip(panels, kinds, strict=True):
            (_weights if role == 'weights' else _inputs)(axes, looks[role])
            axes.set_ylim(bottom=0)
            axes.set_yticks([])
            axes.spines['left'].set_visible(False)

    return Drawing(draw(name, (WIDTH, 130), paint, title=title, is_laid_out=True))


def _weights(axes: Any, look: Look) -> None:
    share = look.histogram / max(look.histogram.sum(), 1)
    codes = look.first_code + np.arange(len(share))
    if len(share) <= 16:
        axes.bar(codes, share, width=0.85, color=LINES[0], linewidth=0)
        if len(share) <= 4:
            axes.set_xticks(codes)
    else:
        axes.stairs(share, np.append(codes, codes[-1] + 1) - 0.5, fill=True, color=LINES[0], linewidth=0)
    axes.set_title(f'weights, {look.bits} bits')
    axes.set_xlabel('code')


def _inputs(axes: Any, look: Look) -> None:
    """Heights are square roots: after a ReLU most inputs are 0, and clipped ones would not be visible."""
    share = np.sqrt(look.histogram / max(look.histogram.sum(), 1))
    edges = (np.arange(len(share) + 1) - BINS_BESIDE) / BINS_INSIDE
    axes.stairs(share, edges, fill=True, color=LINES[1], linewidth=0)
    for edge in (0, 1):
        axes.axvline(edge, color=MARK, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_xticks([0, 1], ['lowest', 'highest'])
    axes.set_title(f'inputs, {look.bits} bits')
    axes.set_xlabel('level')
    axes.set_xlim(edges[0], edges[-1])


def matrix(
    name: str, title: str, values: np.ndarray, labels: tuple[Sequence[str], Sequence[str]], axes: tuple[str, str]
) -> Drawing:
    """Draws a matrix as cells, which are more opaque for larger values, with numbers if there is space.

    Args:
        name: name of the figure.
        title: title of the figure.
        values: (rows, columns), 0 to 1, or counts; NaN leaves a cell empty.
        labels: labels of rows and columns.
        axes: names of the axes of rows and columns.
    """
    counts = np.issubdtype(values.dtype, np.integer)
    # Counts are relative to their row; square roots make a few wrong answers visible.
    strength = np.sqrt(values / np.maximum(values.sum(axis=1, keepdims=True), 1)) if counts else values
    rows, columns = values.shape
    names = [[_cut(text) for text in side] for side in labels]

    def paint(figure):
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        panel = figure.subplots()
        patches, opacities = [], []
        for row, column in np.ndindex(values.shape):
            value = strength[row, column]
            if not np.isfinite(value) or value <= 0:
                continue
            patches.append(Rectangle((column - 0.5, row - 0.5), 1, 1))
            opacities.append(round(float(np.clip(value, 0, 1)), 3))
            if max(rows, columns) <= MOST_NUMBERED:
                text = str(values[row, column]) if counts else f'{value:.2f}'
                size = 11 if len(text) < 4 and columns <= 10 else 9
                panel.text(column, row, text, ha='center', va='center', fontsize=size)
        colors = [(*_rgb(LINES[0]), 0.75 * opacity) for opacity in opacities]
        panel.add_collection(PatchCollection(patches, facecolors=colors, linewidths=0))
        panel.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect='equal')
        is_long = max(map(len, names[1]), default=0) > 3
        every = -(-max(rows, columns) // MOST_TICKS)
        panel.set_xticks(range(0, columns, every), names[1][::every], rotation=90 if is_long else 0)
        panel.set_yticks(range(0, rows, every), names[0][::every])
        panel.tick_params(length=0)
        panel.set_ylabel(axes[0])
        panel.set_xlabel(axes[1])
        for side in panel.spines.values():
            side.set_visible(True)

    side = min(400, max(200, 80 + 34 * max(rows, columns)))
    return Drawing(draw(name, (side, side), paint, title=title))


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))


def _cut(text: Any) -> str:
    text = ''.join(c for c in str(text) if c.isprintable())
    return text if len(text) <= MOST_CHARACTERS else f'{text[: MOST_CHARACTERS - 1]}…'


def dots(
    name: str, title: str, rows: Mapping[str, Sequence[float]], intervals: Mapping[str, Any], unit: str
) -> Drawing:
    """Draws a row for each name: its values as dots, their mean and its interval.

    Args:
        name: name of the figure.
        title: title of the figure.
        rows: values by name; those that are not finite are left out.
        intervals: (mean, low, high) by name; None or NaN for none.
        unit: unit of the values.
    """
    names = list(rows)

    def paint(figure):
        axes = figure.subplots()
        for height, label in enumerate(names):
            values = [value for value in rows[label] if math.isfinite(value)]
            axes.plot(values, [height] * len(values), 'o', color=LINES[0], alpha=0.55, markersize=6, markeredgewidth=0)
            mean, low, high = intervals.get(label) or (math.nan,) * 3
            if math.isfinite(low) and math.isfinite(high):
                axes.plot([low, high], [height + 0.28] * 2, color=MARK, linewidth=1.5, solid_capstyle='butt')
            if math.isfinite(mean):
                axes.plot([mean], [height + 0.28], 'D', color=MARK, markersize=5, markeredgewidth=0)
        _label_rows(axes, names, title, unit)

    return Drawing(draw(name, (WIDTH, 80 + 34 * max(1, len(names))), paint, title=title))


def differences(name: str, title: str, rows: Mapping[str, Any], unit: str) -> Drawing:
    """Draws a row for each name: the mean difference and its interval, with a line at 0.

    Args:
        name: name of the figure.
        title: title of the figure.
        rows: (mean, low, high) by name.
        unit: unit of the differences.
    """
    names = list(rows)

    def paint(figure):
        axes = figure.subplots()
        axes.axvline(0, color=TEXT, linewidth=1)
        for height, (mean, low, high) in enumerate(rows.values()):
            if math.isfinite(low) and math.isfinite(high):
                color = LINES[7] if low <= 0 <= high else LINES[0]
                axes.plot([low, high], [height] * 2, color=color, linewidth=2.5, solid_capstyle='butt')
                axes.plot([mean], [height], 'D', color=color, markersize=6, markeredgewidth=0)
        _label_rows(axes, names, title, unit)

    return Drawing(draw(name, (WIDTH, 80 + 28 * max(1, len(names))), paint, title=title))


def choices(
    name: str, title: str, lines: Mapping[str, Points], taken: Mapping[str, float], labels: tuple[str, str]
) -> Drawing:
    """Draws the score of every choice over its value, with a ring around the selected one.

    Args:
        name: name of the figure.
        title: title of the figure.
        lines: values and scores by method; at most `MOST_LINES` are drawn.
        taken: the selected value by method.
        labels: labels of the values and the scores.
    """
    shown = dict(itertools.islice(lines.items(), MOST_LINES))

    def paint(figure):
        axes = figure.subplots()
        everything = [value for values, _ in shown.values() for value in values]
        for color, (label, (values, scores)) in zip(LINES, shown.items(), strict=False):
            axes.plot(values, scores, 'o-', color=color, linewidth=1.3, markersize=4)
            if label in taken and taken[label] in values:
                score = scores[list(values).index(taken[label])]
                axes.plot([taken[label]], [score], 'o', markersize=10, markerfacecolor='none', markeredgecolor=color)
        if everything and min(everything) > 0 and max(everything) > 5 * min(everything):
            axes.set_xscale('log')
        ticks = sorted(set(everything))
        if len(ticks) <= 6:
            axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
            axes.set_xticks([], minor=True)
        axes.set_title(_cut(title))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(True)
        axes.margins(x=0.1, y=0.15)

    return Drawing(draw(name, (WIDTH, 220), paint, title=title), tuple(shown), '')


def _label_rows(axes: Any, names: Sequence[str], title: str, unit: str) -> None:
    """Labels the rows of a drawing from the top, and its horizontal axis."""
    axes.set_yticks(range(len(names)), [_cut(label) for label in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis='y', length=0)
    axes.set_title(_cut(title))
    axes.set_xlabel(unit)
    axes.grid(True, axis='x')
    axes.locator_params(axis='x', nbins=4)
    axes.spines['left'].set_visible(False)
