"""Measures the cost of a run beyond its steps: input, logging and checkpoints, and the time to the first step.

Command: python -m benchmarks.run --config=configs/cifar10_resnet20.py --config.partner.torch_file=FILE \\
    --config.train.steps=120 --config.optimizer.warmup_epochs=0 --config.train.log_every_steps=10 \\
    --config.checkpoint.every_steps=50

Runs of main.py, each in a new folder, take turns with the bare step on random images. All runs share one new folder for
compiled programs, so that only the first compiles. The seconds of a step in a run are measured between its first and
its last record, and include everything in between.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.step import Case, Worker, config_arguments

ROOT = Path(__file__).resolve().parents[1]


def real_run(arguments: list[str], workdir: Path) -> dict[str, float]:
    """Runs main.py and returns the seconds of a step, and those from the start of the process to the first step's end.

    Raises:
        SystemExit: if the run fails or writes fewer than two records.
    """
    began = time.monotonic()
    first: float | None = None
    command = [sys.executable, str(ROOT / 'main.py'), *arguments, f'--workdir={workdir}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if first is None and line.startswith('train '):
                first = time.monotonic() - began
    records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    records = [record for record in records if record['phase'] == 'train' and 'loss' in record]
    if process.returncode or first is None or len(records) < 2:
        raise SystemExit(f'Error: {" ".join(command)} failed, or logged less than twice.')
    steps = records[-1]['step'] - records[0]['step']
    each = (records[-1]['seconds'] - records[0]['seconds']) / steps
    return {'seconds': each, 'start': first - (records[0]['step'] - 1) * each}


def report(bare: list[float], runs: list[dict[str, float]]) -> str:
    """Returns the measurements as a Markdown table."""
    step, real = statistics.median(bare), statistics.median(run['seconds'] for run in runs)
    first, later = runs[0]['start'], statistics.median(run['start'] for run in runs[1:])
    losses = [100 * (run['seconds'] / one - 1) for run, one in zip(runs, bare, strict=True)]
    return (
        '| bare step, ms | step of a run, ms | lost, % | lost in each turn, % | first start, s | later starts, s '
        '| later / first |\n|---|---|---|---|---|---|---|\n'
        f'| {1e3 * step:.1f} | {1e3 * real:.1f} | {100 * (real / step - 1):.1f} '
        f'| {", ".join(f"{loss:.1f}" for loss in losses)} | {first:.1f} | {later:.1f} | {later / first:.2f} |\n'
    )


def main(argv: list[str]) -> None:
    """Measures, prints the table and stores it with all measurements."""
    del argv
    given, arguments = flags.FLAGS, config_arguments()
    bare: list[float] = []
    runs: list[dict[str, float]] = []
    worker = Worker('the bare step', Case('recipe', arguments))
    worker.wait()
    try:
        with tempfile.TemporaryDirectory() as folder:
            kept = f'--config.compilation_cache={folder}/compiled'
            for turn in range(given.turns):
                runs.append(real_run([*arguments, kept], Path(folder) / str(turn)))
                bare.append(worker.ask(given.steps)['seconds'] / given.steps)
    finally:
        worker.end()
    text = report(bare, runs)
    print(text)
    if given.output:
        measured: dict[str, Any] = {'bare': bare, 'runs': runs}
        Path(given.output).write_text(json.dumps(measured, indent=2) + '\n', encoding='utf-8')
        Path(given.output).with_suffix('.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    from ml_collections import config_flags

    config_flags.DEFINE_config_file('config', 'configs/digits.py', 'Recipe, with arguments after a colon.')
    flags.DEFINE_integer('turns', 3, 'Runs, and turns of the bare step.', lower_bound=2)
    flags.DEFINE_integer('steps', 50, 'Steps of a turn of the bare step.', lower_bound=1)
    flags.DEFINE_string('output', None, 'JSON file for all measurements; the table goes beside it.')
    app.run(main)
