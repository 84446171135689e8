"""Draws what diagnoses measured while networks trained: methods beside each other, by block, over the steps.

Command: python -m research.draw_diagnoses PICTURE.png WORKDIR [WORKDIR ...]

Each workdir has diagnoses of several steps (`--config.diagnosis.every_steps=N`). Runs whose workdirs share a parent
are seeds of one method, named after that parent. A line is the mean over seeds, the area around it the range.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from absl import app
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bqat_jax.analysis.diagnosis import DIRECTORY
from bqat_jax.storage import read_json

# Row titles, and where a block's number is in a diagnosis.
MEASURES = {
    'cosine, LP loss to smoothed': ('gradients', 'lp', 'blocks', 'cosine_to_smoothed'),
    'cosine, whole loss to smoothed': ('gradients', 'full', 'blocks', 'cosine_to_smoothed'),
    'cosine, LP loss to full precision': ('gradients', 'lp', 'blocks', 'cosine_to_full_precision'),
    'relative error of features': ('features', 'relative_error'),
}
Curves = dict[str, dict[int, list[float]]]  # block -> step -> a number for every seed


def block_values(diagnosis: Mapping[str, Any], where: Sequence[str]) -> dict[str, float]:
    """Returns a measure of every block."""
    *sections, measure = where
    blocks = diagnosis
    for section in sections:
        blocks = blocks[section]
    return {block: float(measures[measure]) for block, measures in blocks.items()}


def read_diagnoses(workdirs: Sequence[Path]) -> dict[str, dict[str, Curves]]:
    """Returns every measure in MEASURES: method -> measure -> curves.

    Raises:
        SystemExit: if a workdir has less than two diagnoses.
    """
    methods: dict[str, dict[str, Curves]] = {}
    for workdir in workdirs:
        files = sorted((workdir / DIRECTORY).glob('step_*.json'), key=lambda path: int(path.stem.removeprefix('step_')))
        if len(files) < 2:
            raise SystemExit(
                f'Error: {workdir} has {len(files)} diagnoses, and a curve needs two. Train with '
                '--config.diagnosis.every_steps=N.'
            )
        curves = methods.setdefault(workdir.absolute().parent.name, {name: {} for name in MEASURES})
        for file in files:
            diagnosis, step = read_json(file), int(file.stem.removeprefix('step_'))
            for name, where in MEASURES.items():
                for block, value in block_values(diagnosis, where).items():
                    curves[name].setdefault(block, {}).setdefault(step, []).append(value)
    return methods


def _draw_curve(panel: Axes, method: str, steps: Mapping[int, list[float]], color: Any) -> None:
    means = [sum(values) / len(values) for values in steps.values()]
    panel.plot(list(steps), means, marker='.', color=color, label=method)
    low, high = ([pick(values) for values in steps.values()] for pick in (min, max))
    panel.fill_between(list(steps), low, high, color=color, alpha=0.15, linewidth=0)


def draw(picture: Path, methods: Mapping[str, Mapping[str, Curves]]) -> None:
    """Writes the picture: a row for every measure, a column for every block."""
    first = next(iter(methods.values()))
    blocks = list(next(iter(first.values())))
    figure = Figure(figsize=(3.2 * len(blocks), 2.3 * len(MEASURES)), layout='constrained')
    panels = figure.subplots(len(MEASURES), len(blocks), squeeze=False, sharex=True, sharey='row')
    for row, name in zip(panels, MEASURES, strict=True):
        row[0].set_ylabel(name, fontsize='small')
        for panel, block in zip(row, blocks, strict=True):
            panel.set_visible(any(curves[name].get(block) for curves in methods.values()))  # the head has no features
            for number, (method, curves) in enumerate(methods.items()):
                _draw_curve(panel, method, curves[name].get(block, {}), matplotlib.colormaps['tab10'](number))
    for panel, block in zip(panels[0], blocks, strict=True):
        panel.set_title(block)
    for panel in panels[-1]:
        panel.set_xlabel('step')
    panels[0][0].legend(fontsize='x-small')
    figure.savefig(picture, dpi=90)


def main(argv: list[str]) -> None:
    """Reads the command line."""
    if len(argv) < 3:
        raise app.UsageError('Give the picture to write, and the workdirs of runs.')
    draw(Path(argv[1]), read_diagnoses([Path(name) for name in argv[2:]]))


if __name__ == '__main__':
    app.run(main)
