"""Measures the growth of a long run's memory: resident memory of main.py by step, with logs, checkpoints and diagnoses.

Command: python -m benchmarks.growth --steps=20000

Only for Linux, which reports a process's memory in /proc. The run has the default recipe, the digits, with a short
training of the partner. Memory is read every half second and assigned to the last recorded step. The growth is the
slope of a line fitted to the second half of the steps, after one-time allocations.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 0.5
ROWS = 10


def resident_bytes(process: int) -> int:
    """Returns the current resident memory of a process, in bytes."""
    pages = int(Path(f'/proc/{process}/statm').read_text(encoding='ascii').split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


def last_step(metrics: Path) -> int:
    """Returns the training step of the last complete record of a run, or 0 if there is none."""
    if not metrics.exists():
        return 0
    with metrics.open('rb') as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().split(b'\n')[:-1]
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # its beginning was not read
            continue
        if record.get('phase') == 'train':
            return int(record['step'])
    return 0


def watch(arguments: Sequence[str], workdir: Path) -> list[tuple[int, int]]:
    """Runs main.py and returns pairs of a training step and the resident bytes at that time.

    Raises:
        SystemExit: if the run fails.
    """
    command = [sys.executable, str(ROOT / 'main.py'), *arguments, f'--workdir={workdir}']
    seen: list[tuple[int, int]] = []
    with (workdir.parent / 'output').open('w', encoding='utf-8') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                try:
                    pair = last_step(workdir / 'metrics.jsonl'), resident_bytes(process.pid)
                except (OSError, IndexError):  # it ended just now
                    break
                seen.append(pair)
                time.sleep(SECONDS)
        except BaseException:  # an interrupt must end the run, too
            process.kill()
            raise
        finally:
            process.wait()
    if process.returncode:
        raise SystemExit(f'Error: {" ".join(command)} failed:\n{(workdir.parent / "output").read_text()[-2000:]}')
    last = max((step for step, _ in seen), default=0)
    return [(step, size) for step, size in seen if 0 < step < last]  # evaluation and report follow the last step


def growth(seen: Sequence[tuple[int, int]]) -> float:
    """Returns the slope of the second half of the steps, in bytes per step.

    Raises:
        ValueError: if it has fewer than three different steps.
    """
    steps, sizes = np.array(seen, float).T
    late = steps > steps.max() / 2
    if len(set(steps[late])) < 3:
        raise ValueError(f'{late.sum()} readings in the second half are too few. Use more steps.')
    return float(np.polyfit(steps[late], sizes[late], 1)[0])


def table(seen: Sequence[tuple[int, int]]) -> str:
    """Returns the median and the least resident memory in each tenth of the steps, and the growth, as Markdown."""
    steps, sizes = np.array(seen, float).T
    edges = np.linspace(0, steps.max(), ROWS + 1)
    lines = ['| steps | resident MiB | least |', '|---|---|---|']
    for low, high in itertools.pairwise(edges):
        inside = sizes[(steps > low) & (steps <= high)]
        if len(inside):
            lines.append(f'| {low:.0f}-{high:.0f} | {np.median(inside) / 2**20:.0f} | {inside.min() / 2**20:.0f} |')
    return '\n'.join(lines) + f'\n\nGrowth: {1000 * growth(seen) / 2**20:.3f} MiB in 1000 steps.\n'


def main(argv: list[str]) -> None:
    """Runs main.py and prints the table."""
    del argv
    steps = flags.FLAGS.steps
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            '--config.partner.epochs=4',
            f'--config.train.steps={steps}',
            '--config.train.log_every_steps=20',
            f'--config.checkpoint.every_steps={max(1, steps // 40)}',
            f'--config.diagnosis.every_steps={max(1, steps // 20)}',
            f'--config.data.dir={folder}/data',
        ]
        print(table(watch(arguments, Path(folder) / 'run')))


if __name__ == '__main__':
    flags.DEFINE_integer('steps', 20_000, 'Training steps of the run.', lower_bound=100)
    app.run(main)
