"""Measures how a training step's cost grows with depth, blocks, bits, batch, replicas and devices.

Command: python -m benchmarks.scaling --axis=blocks --variants=prefix,prefix_sampled

Every value of an axis is measured in a separate process, and processes take turns, as in benchmarks.step. The growth is
the exponent p of seconds = c · value^p, fitted to the medians on logarithmic axes.
"""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.step import Case, config_arguments, measure

# The axes with their default values; networks are CIFAR ResNets.
AXES: dict[str, tuple[int, ...]] = {
    'depth': (8, 14, 20, 32),
    'blocks': (2, 3, 5, 9),
    'bits': (2, 3, 4, 8),
    'batch': (32, 64, 128, 256),
    'replicas': (1, 2, 4, 8),
    'devices': (1, 2, 4, 8),
}


def case(axis: str, value: int, variant: str, arguments: Sequence[str], depth: int) -> Case:
    """Returns the case for a value of an axis.

    Raises:
        ValueError: for an invalid value.
    """
    settings: dict[str, list[str]] = {
        'depth': [f'--config.network.depth={value}'],
        'bits': [f'--config.quant.weights.bits={value}', f'--config.quant.activations.bits={value}'],
        'batch': [f'--config.train.batch_size={value}'],
        'replicas': [],
        'devices': [],
    }
    if axis == 'blocks':
        settings['blocks'] = [f'--config.replacement.cut={",".join(cuts(depth, value))}']
    if axis == 'replicas':
        variant = f'replicas:{value}'
    return Case(variant, [*arguments, *settings[axis]], value if axis == 'devices' else None)


def cuts(depth: int, blocks: int) -> list[str]:
    """Returns the parts after which to split a CIFAR ResNet into blocks that are as equal as possible.

    Raises:
        ValueError: if it has fewer residual blocks, or `blocks` is below 2.
    """
    each = (depth - 2) // 6
    parts = [f'stage{stage + 1}_block{number + 1}' for stage in range(3) for number in range(each)]
    if not 2 <= blocks <= len(parts):
        raise ValueError(f'A CIFAR ResNet of depth {depth} can be split into 2 to {len(parts)} blocks, not {blocks}.')
    return [parts[round(len(parts) * number / blocks) - 1] for number in range(1, blocks)]


def growth(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns the exponent p of seconds = c · value^p, fitted by least squares of logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def table(axis: str, growths: Mapping[str, Mapping[int, dict[str, Any]]]) -> str:
    """Returns a Markdown table: a line for each variant, with milliseconds at each value and the growth."""
    values = list(next(iter(growths.values())))
    lines = [
        f'| {axis} | {" | ".join(map(str, values))} | last / first | growth |',
        '|' + '---|' * (len(values) + 3),
    ]
    for variant, measured in growths.items():
        seconds = [statistics.median(measured[value]['seconds']) for value in values]
        power = growth(values, seconds) if len(values) > 1 else math.nan
        cells = [f'{1e3 * one:.0f}' for one in seconds]
        lines.append(f'| {variant}, ms | {" | ".join(cells)} | {seconds[-1] / seconds[0]:.2f} | {power:.2f} |')
    return '\n'.join(lines) + '\n'


def main(argv: list[str]) -> None:
    """Measures along the axis, prints the table and stores it with all measurements."""
    del argv
    given, arguments = flags.FLAGS, config_arguments()
    values = [int(value) for value in given.values] if given.values else list(AXES[given.axis])
    variants = ['lsq'] if given.axis == 'replicas' else given.variants
    try:
        cases = {
            f'{variant} {value}': case(given.axis, value, variant, arguments, given.config.network.get('depth', 0))
            for variant in variants
            for value in values
        }
    except ValueError as error:
        sys.exit(f'Error: {error}')
    measured = measure(cases, given.turns, given.steps)
    growths = {variant: {value: measured[f'{variant} {value}'] for value in values} for variant in variants}
    text = table(given.axis, growths)
    print(text)
    if given.output:
        Path(given.output).write_text(json.dumps(growths, indent=2) + '\n', encoding='utf-8')
        Path(given.output).with_suffix('.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    from ml_collections import config_flags

    config_flags.DEFINE_config_file('config', 'configs/cifar10_resnet20.py', 'Recipe, with arguments after a colon.')
    flags.DEFINE_enum('axis', 'blocks', list(AXES), 'The axis.')
    flags.DEFINE_list('values', [], 'Values of the axis, separated by commas; its defaults if empty.')
    flags.DEFINE_list('variants', ['prefix', 'prefix_sampled'], 'Variants of benchmarks.step; for replicas plain QAT.')
    flags.DEFINE_integer('turns', 7, 'Turns of every variant.', lower_bound=1)
    flags.DEFINE_integer('steps', 2, 'Steps of a turn.', lower_bound=1)
    flags.DEFINE_string('output', None, 'JSON file for all measurements; the table goes beside it.')
    app.run(main)
