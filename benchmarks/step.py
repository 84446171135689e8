"""Measures the cost of a training step: full precision, plain QAT, block replacement, every estimator, and PyTorch.

Command: python -m benchmarks.step --config=configs/cifar10_resnet20.py --variants=fp,lsq,distillation,prefix
         python -m benchmarks.step --variants=fp,lsq,torch_fp,torch_lsq

Every variant has a separate process, which compiles and warms up; then they take turns of a few steps, so that other
load on the machine affects all of them. A turn starts with one unmeasured step, which meets cold caches. The table has
medians and quartiles over turns. Each process first measures a matrix product of 2048 x 2048, the ceiling that achieved
operations are compared with. Operations are those that XLA counts; PyTorch's are not counted. Images and labels are
random.

Variants: fp; lsq (plain QAT); distillation; a plan such as prefix or prefix_sampled; estimator:NAME (plain QAT with
it); recipe (the config unchanged); bf16:VARIANT; replicas:N (of plain QAT, each with its own batch), as in a run,
replicas_in_turns:N (one after another) and replicas_together:N (vectorized); torch_fp, torch_lsq, and
torch_compiled_fp and torch_compiled_lsq (torch.compile; on a GPU with CUDA graphs).
"""

import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

PLANS = ('prefix', 'prefix_sampled', 'single', 'single_sampled', 'suffix', 'bernoulli')
VARIANTS = 'fp,lsq,distillation,prefix,prefix_sampled,single_sampled'
REPLICAS = re.compile(r'replicas(?P<way>_in_turns|_together)?:(?P<count>\d+)')
# PyTorch records its CUDA graphs in the first steps.
WARM_UP = 4
CEILING_SIZE, CEILING_REPEATS = 2048, 5


def expected_units(variant: str, blocks: int) -> float | None:
    """Returns a step's cost in forward passes of the network if its blocks are equal (docs/method.md), or None."""
    units = {'fp': 3.0, 'lsq': 3.0, 'distillation': 4.0, 'prefix': 4.0 + blocks - 1, 'prefix_sampled': 5.0}
    variant = variant.removeprefix('bf16:')
    if match := REPLICAS.fullmatch(variant):
        return 3.0 * int(match['count'])
    if variant.startswith(('estimator:', 'torch_')):
        return 3.0
    return units.get(variant)


def change_config(config: Any, variant: str) -> Any:
    """Returns a recipe's config changed for a variant.

    Raises:
        ValueError: for an unknown variant.
    """
    config = config.copy_and_resolve_references()
    if variant == 'recipe':
        return config
    if variant.startswith('bf16:'):
        config.network.dtype = 'bfloat16'
        return change_config(config, variant.removeprefix('bf16:'))
    config.replacement.plan, config.replacement.distillation = 'none', 0.0
    if variant == 'fp':
        config.quant.weights.name = config.quant.activations.name = 'none'
        config.quant.rules = ()
    elif variant == 'distillation':
        config.replacement.distillation = 1.0
    elif variant in PLANS:
        config.replacement.plan, config.replacement.distillation = variant, 1.0
    elif variant.startswith('estimator:'):
        config.quant.weights.estimator = config.quant.activations.estimator = variant.removeprefix('estimator:')
    elif match := REPLICAS.fullmatch(variant):
        config.train.replicas = int(match['count'])
    elif variant != 'lsq':
        raise ValueError(f'There is no variant {variant!r}.')
    return config


def make_jax_runner(config: Any, variant: str) -> tuple[Callable[[int], None], dict[str, Any]]:
    """Returns a function that makes a number of steps and waits for them, and facts about the step."""
    import jax
    import jax.numpy as jnp

    from benchmarks.bench import make_bench, peak_bytes
    from bqat_jax.distributed.replicas import Replicas

    config = change_config(config, variant)
    match = REPLICAS.fullmatch(variant)
    if match and match['way']:
        Replicas.take_turns = match['way'] == '_in_turns'  # pyright: ignore[reportAttributeAccessIssue]
    product = jax.jit(lambda a: a @ a)
    square = jnp.ones((CEILING_SIZE, CEILING_SIZE), config.network.dtype)
    ceiling = _ceiling(lambda: jax.block_until_ready(product(square)))
    bench = make_bench(config, with_arrays=True)
    began = time.monotonic()
    compiled = bench.step.lower(bench.state, bench.partner, None, bench.batch).compile()
    facts = {
        'compile_seconds': time.monotonic() - began,
        'flops': compiled.cost_analysis()['flops'] * len(jax.devices()),
        'bytes_accessed': compiled.cost_analysis().get('bytes accessed'),
        'peak_bytes': peak_bytes(compiled),
        'ceiling': ceiling,
        'images': config.train.batch_size * config.train.replicas,
        'blocks': len(bench.experiment.network.blocks),
        'device': jax.devices()[0].device_kind,
    }
    state = bench.state
    waits = jax.default_backend() == 'cpu'  # with a long queue, XLA's CPU devices can block each other

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, metrics = compiled(state, bench.partner, None, bench.batch)
            if waits:
                jax.block_until_ready(metrics)
        jax.block_until_ready(state)

    return run, facts


def make_torch_runner(config: Any, variant: str) -> tuple[Callable[[int], None], dict[str, Any]]:
    """Returns what `make_jax_runner` does, for PyTorch.

    Raises:
        ValueError: for a network other than a CIFAR ResNet with shortcut A.
    """
    import torch  # pyright: ignore[reportMissingImports]

    from benchmarks.torch_step import Step

    network = config.network
    if network.name != 'cifar_resnet' or network.shortcut != 'A' or network.preactivation:
        raise ValueError('The PyTorch variants are CIFAR ResNets with shortcut A.')
    cuda = torch.cuda.is_available()
    square = torch.ones(CEILING_SIZE, CEILING_SIZE, device='cuda' if cuda else 'cpu')
    ceiling = _ceiling(lambda: (square @ square).sum().item())
    bits = 0 if variant.endswith('_fp') else config.quant.weights.bits
    step = Step(network.depth, network.width, bits, config.train.batch_size)
    if variant.startswith('torch_compiled_'):
        step.compile()
    name = torch.cuda.get_device_name() if cuda else 'cpu'
    facts = {'ceiling': ceiling, 'images': config.train.batch_size, 'device': f'PyTorch {torch.__version__}, {name}'}

    def run(count: int) -> None:
        step(count)

    return run, facts


def _ceiling(product: Callable[[], Any]) -> float:
    """Operations per second of a matrix product, the best of several runs."""
    product()
    seconds = []
    for _ in range(CEILING_REPEATS):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return 2 * CEILING_SIZE**3 / min(seconds)


def work(config: Any, variant: str) -> None:
    """Prints facts about the step; then, for each number of steps read from standard input, the seconds they take."""
    logging.getLogger('absl').setLevel(logging.ERROR)
    if variant.startswith('torch'):
        run, facts = make_torch_runner(config, variant)
    else:
        run, facts = make_jax_runner(config, variant)
    run(WARM_UP)
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        run(1)
        began = time.perf_counter()
        run(int(line))
        seconds = time.perf_counter() - began
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({'seconds': seconds, 'resident': resident}), flush=True)


class Case(NamedTuple):
    """The configuration of a measuring process.

    Attributes:
        variant: one of the variants in this module's docstring.
        arguments: the config and its changes, `--config=FILE --config.key=value`.
        devices: virtual CPU devices; None for the machine's devices.
    """

    variant: str
    arguments: Sequence[str]
    devices: int | None = None


class Worker:
    """A process that compiles and warms up a case, and makes steps on request."""

    def __init__(self, name: str, case: Case):
        """Starts the process; call `wait` before `ask`."""
        self._name = name
        command = [sys.executable, '-m', 'benchmarks.step', *case.arguments, f'--work={case.variant}']
        flags_of_xla = os.environ.get('XLA_FLAGS', '')
        if case.devices is not None:
            flags_of_xla += f' --xla_force_host_platform_device_count={case.devices}'
        environment = {**os.environ, 'XLA_FLAGS': flags_of_xla.strip()}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def wait(self) -> dict[str, Any]:
        """Waits until the process is ready and returns facts about its step."""
        return self._answer()

    def ask(self, steps: int) -> dict[str, float]:
        """Makes steps; returns their 'seconds' and the process's peak memory, 'resident', in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.write(f'{steps}\n')
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f'Error: the process of {self._name} ended; its output is above.')
        return json.loads(line)


def measure(cases: Mapping[str, Case], turns: int, steps: int, *, together: bool = False) -> dict[str, dict[str, Any]]:
    """Returns the facts of every case, and its 'seconds' per step in every turn.

    Args:
        cases: cases by name.
        turns: turns of every case.
        steps: steps per turn.
        together: whether all processes start at once, which affects their ceilings and compile times.
    """
    measured: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    try:
        for name, case in cases.items():
            workers[name] = Worker(name, case)
            if not together:
                measured[name] = {**workers[name].wait(), 'seconds': []}
        if together:
            measured = {name: {**worker.wait(), 'seconds': []} for name, worker in workers.items()}
        for _ in range(turns):
            for name, worker in workers.items():
                answer = worker.ask(steps)
                measured[name]['seconds'].append(answer['seconds'] / steps)
                measured[name]['resident'] = answer['resident']
    finally:
        for worker in workers.values():
            worker.end()
    return measured


def config_arguments() -> list[str]:
    """Returns the arguments of this process that set the config."""
    return [argument for argument in sys.argv[1:] if argument.startswith('--config')]


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Returns the measurements as a Markdown table; variants are compared with the first."""
    lines = [
        '| variant | ms | quartiles | examples/s | time / first | by units | measured / units | compile s | peak MiB '
        '| resident MiB | Gflop/s | of the ceiling |',
        '|' + '---|' * 12,
    ]
    first, blocks = next(iter(measured)), max(one.get('blocks', 1) for one in measured.values())
    base, base_units = statistics.median(measured[first]['seconds']), expected_units(first, blocks)
    for variant, one in measured.items():
        median = statistics.median(one['seconds'])
        quartiles = statistics.quantiles(one['seconds'], n=4) if len(one['seconds']) > 1 else [median] * 3
        units = expected_units(variant, blocks)
        ratio = units / base_units if units and base_units else None
        speed = one['flops'] / median if 'flops' in one else None
        cells = [
            variant,
            f'{1e3 * median:.1f}',
            f'{1e3 * quartiles[0]:.1f}-{1e3 * quartiles[2]:.1f}',
            f'{one["images"] / median:.0f}',
            f'{median / base:.2f}',
            f'{ratio:.2f}' if ratio else '',
            f'{median / base / ratio:.2f}' if ratio else '',
            f'{one["compile_seconds"]:.0f}' if 'compile_seconds' in one else '',
            f'{one["peak_bytes"] / 2**20:.0f}' if 'peak_bytes' in one else '',
            f'{one["resident"] / 2**20:.0f}',
            f'{speed / 1e9:.0f}' if speed else '',
            f'{100 * speed / one["ceiling"]:.0f} %' if speed else '',
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def main(argv: list[str]) -> None:
    """Measures, prints the table and stores it with all measurements."""
    given = flags.FLAGS
    if given.work:
        work(given.config, given.work)
        return
    cases = {variant: Case(variant, config_arguments()) for variant in given.variants.split(',')}
    measured = measure(cases, given.turns, given.steps, together=given.together)
    text = table(measured)
    print(text)
    if given.output:
        Path(given.output).write_text(json.dumps(measured, indent=2) + '\n', encoding='utf-8')
        Path(given.output).with_suffix('.md').write_text(text, encoding='utf-8')
    del argv


if __name__ == '__main__':
    from ml_collections import config_flags

    config_flags.DEFINE_config_file('config', 'configs/cifar10_resnet20.py', 'Recipe, with arguments after a colon.')
    flags.DEFINE_string('variants', VARIANTS, 'Variants, separated by commas; they are compared with the first.')
    flags.DEFINE_integer('turns', 9, 'Turns of every variant.', lower_bound=1)
    flags.DEFINE_integer('steps', 3, 'Steps per turn.', lower_bound=1)
    flags.DEFINE_bool('together', False, 'Start all processes at once, which is faster with many cores.')
    flags.DEFINE_string('output', None, 'JSON file for all measurements; the table goes beside it.')
    flags.DEFINE_string('work', None, 'Internal: the variant of a measuring process.')
    app.run(main)
