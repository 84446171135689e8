"""Compares a training step, its convolutions and the rest, with the ceilings of this machine.

Command: python -m benchmarks.roofline --config=configs/cifar10_resnet20.py:bits=2 --variant=lsq

Two ceilings are measured in this process: operations per second of a matrix product of 2048 x 2048, and bytes per
second of adding one to an array larger than all caches. A part's bound is the larger of its operations and its bytes,
each divided by its ceiling (a roofline: Williams, Waterman and Patterson, doi 10.1145/1498765.1498785). Bytes of a
convolution are those of its two arguments and its result; bytes of the rest are those that the step accesses according
to XLA, without the convolutions'.

Every convolution of the network is measured alone, with prepared arguments: the forward pass, the gradients of its
input and of its kernel by `networks/convolution.py`, and the latter by XLA. All take turns. The rest of the step is its
time minus that of its convolutions, so it includes their slowdown within the step.
"""

import collections
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.extend.core import Jaxpr, jaxprs_in_params

from benchmarks.bench import make_bench
from benchmarks.step import CEILING_SIZE, change_config
from bqat_jax.networks.convolution import LAYOUT, input_gradient, kernel_gradient

COPIED_BYTES = 2**28
PARTS, BY_XLA = ('forward', 'of inputs', 'of kernels'), 'of kernels, by XLA'


class Convolution(NamedTuple):
    """A convolution without groups, of images in NHWC with a kernel in HWIO.

    Attributes:
        images: shape of its input.
        kernel: shape of its kernel.
        strides: strides for height and width.
        padding: pixels before and after, for height and width.
    """

    images: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], ...]

    def run(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns its output."""
        return jax.lax.conv_general_dilated(x, kernel, self.strides, self.padding, dimension_numbers=LAYOUT)

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of its output."""
        given = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (self.images, self.kernel))
        result: Any = jax.eval_shape(self.run, *given)
        return result.shape

    @property
    def operations(self) -> float:
        """Multiplications and additions of one pass, including those with the padding's zeros."""
        rows, columns, channels, _ = self.kernel
        return 2.0 * math.prod(self.output) * rows * columns * channels

    @property
    def bytes(self) -> float:
        """Bytes of input, kernel and output in float32."""
        return sum(4.0 * math.prod(shape) for shape in (self.images, self.kernel, self.output))


class Ceilings(NamedTuple):
    """The measured ceilings of the machine: operations and bytes per second."""

    operations: float
    bytes: float

    def bound(self, operations: float, size: float) -> float:
        """Returns the lower bound in seconds for a number of operations and bytes."""
        return max(operations / self.operations, size / self.bytes)


def convolutions_of(jaxpr: Jaxpr) -> Iterator[Convolution]:
    """Yields the convolutions of a program and of its inner programs.

    Raises:
        ValueError: for one with groups or dilation, which is not supported.
    """
    for operation in jaxpr.eqns:
        for inner in jaxprs_in_params(operation.params):
            yield from convolutions_of(inner)
        if operation.primitive.name == 'conv_general_dilated':
            given = operation.params
            spread = any(size != 1 for size in (*given['lhs_dilation'], *given['rhs_dilation']))
            if spread or given['feature_group_count'] * given['batch_group_count'] != 1:
                raise ValueError(f'{operation} has groups or dilation, which is not supported.')
            arguments: Any = [x.aval for x in operation.invars]
            images, kernel = (tuple(x.shape) for x in arguments)
            yield Convolution(images, kernel, tuple(given['window_strides']), tuple(map(tuple, given['padding'])))


def timings(functions: Mapping[Any, Callable[[], Any]], turns: int) -> dict[Any, float]:
    """Returns the median seconds of functions, which take turns after a first call of each."""
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(turns):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ceilings() -> Ceilings:
    """Measures the ceilings of the machine, each the best of several runs."""
    square, long = jnp.ones((CEILING_SIZE, CEILING_SIZE)), jnp.ones(COPIED_BYTES // 4)
    product, add = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
    best = [float('inf'), float('inf')]
    for _ in range(7):
        taken = timings({0: lambda: product(square), 1: lambda: add(long)}, 1)
        best = [min(best[number], taken[number]) for number in (0, 1)]
    return Ceilings(2 * CEILING_SIZE**3 / best[0], 2 * COPIED_BYTES / best[1])


def functions_of(one: Convolution) -> dict[str, Callable[[], Any]]:
    """Returns the passes of a convolution with prepared arguments."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, gradient = (
        jax.random.normal(key, shape) for key, shape in zip(keys, (one.images, one.kernel, one.output), strict=True)
    )
    of_inputs = jax.jit(
        lambda k, g: input_gradient(one.images, k, g, one.padding, one.strides, dimension_numbers=LAYOUT)
    )
    of_kernels = jax.jit(lambda x, g: kernel_gradient(x, g, one.padding, one.kernel[:2], one.strides))
    by_xla = jax.jit(lambda x, k, g: jax.vjp(functools.partial(one.run, x), k)[1](g)[0])
    run = jax.jit(one.run)
    return {
        'forward': lambda: run(x, kernel),
        'of inputs': lambda: of_inputs(kernel, gradient),
        'of kernels': lambda: of_kernels(x, gradient),
        BY_XLA: lambda: by_xla(x, kernel, gradient),
    }


def measure(config: Any, turns: int) -> tuple[Mapping[Convolution, int], dict[Any, float], float, Ceilings]:
    """Returns the network's convolutions with their numbers, seconds, bytes that the step accesses, and the ceilings.

    Keys of seconds are (convolution, pass), and 'step' for the step.
    """
    machine = ceilings()
    bench = make_bench(config, with_arrays=True)
    network = bench.experiment.network
    forward = functools.partial(network.apply, train=False)
    program = jax.make_jaxpr(forward)(bench.experiment.shapes, network.batch_of(config.train.batch_size))
    counted = collections.Counter(convolutions_of(program.jaxpr))
    compiled = bench.step.lower(bench.state, bench.partner, None, bench.batch).compile()
    state = bench.state

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, bench.partner, None, bench.batch)
        return metrics

    functions: dict[Any, Callable[[], Any]] = {'step': step}
    for one in counted:
        functions.update({(one, name): function for name, function in functions_of(one).items()})
    return counted, timings(functions, turns), compiled.cost_analysis()['bytes accessed'], machine


def report(counted: Mapping[Convolution, int], seconds: Mapping[Any, float], size: float, machine: Ceilings) -> str:
    """Returns the measurements as Markdown: the parts of the step, and the convolutions."""
    lines = [
        f'Ceilings: {machine.operations / 1e9:.0f} Gflop/s, {machine.bytes / 1e9:.1f} GB/s.\n',
        '| part | number | Gflop | GB | bound ms | measured ms | bound / measured |',
        '|---|---|---|---|---|---|---|',
    ]
    operations = sum(number * one.operations for one, number in counted.items())
    moved = sum(number * one.bytes for one, number in counted.items())
    number = sum(counted.values())
    bounds = sum(number * machine.bound(one.operations, one.bytes) for one, number in counted.items())
    alone = {part: sum(number * seconds[one, part] for one, number in counted.items()) for part in PARTS}
    rest = max(0.0, size - 3 * moved)
    rows: list[tuple[Any, ...]] = [
        (f'convolutions: {part}', number, operations, moved, bounds, alone[part]) for part in PARTS
    ]
    rows.append(('the rest', '', 0.0, rest, rest / machine.bytes, seconds['step'] - sum(alone.values())))
    rows.append(('the step', '', 3 * operations, 3 * moved + rest, 3 * bounds + rest / machine.bytes, seconds['step']))
    for name, count, flops, gigabytes, bound, taken in rows:
        ratio = f'{100 * bound / taken:.0f} %' if taken > 0 else ''
        cells = f'{flops / 1e9:.2f} | {gigabytes / 1e9:.2f} | {1e3 * bound:.0f} | {1e3 * taken:.0f} | {ratio}'
        lines.append(f'| {name} | {count} | {cells} |')
    lines += [
        '\n| input | kernel | stride | number | bound ms | forward | of inputs | of kernels | of kernels, by XLA |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for one, number in counted.items():
        cells = [
            ' x '.join(map(str, one.images)),
            ' x '.join(map(str, one.kernel)),
            str(one.strides[0]),
            str(number),
            f'{1e3 * machine.bound(one.operations, one.bytes):.1f}',
            *(f'{1e3 * seconds[one, part]:.1f}' for part in (*PARTS, BY_XLA)),
        ]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def main(argv: list[str]) -> None:
    """Measures and prints the tables."""
    del argv
    given = flags.FLAGS
    print(report(*measure(change_config(given.config, given.variant), given.turns)))


if __name__ == '__main__':
    from ml_collections import config_flags

    config_flags.DEFINE_config_file('config', 'configs/cifar10_resnet20.py', 'Recipe, with arguments after a colon.')
    flags.DEFINE_string(
        'variant', 'lsq', 'Variant to measure: fp, lsq, or another of benchmarks.step that runs in JAX.'
    )
    flags.DEFINE_integer('turns', 9, 'Turns of the step and of every pass of a convolution.', lower_bound=1)
    app.run(main)
