"""Measures the size of a recipe's exported network in every format, and its speed on this machine.

Command: python -m benchmarks.export --config=configs/digits.py:bits=2 --formats=packed,stablehlo,onnx,qcdq

The network is calibrated and not trained, which does not affect its speed. Its files are a few percent smaller than a
trained network's: StableHLO and ONNX store an array of equal values, such as the scales of a new batch norm, as one
value. All programs take turns on one batch, and medians of seconds are reported, also for the full-precision and the
fake-quantized network.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.bench import Bench, make_bench
from bqat_jax.data.augmentation import normalize
from bqat_jax.experiment.command_line import load_recipe
from bqat_jax.experiment.export_report import FILES, PACKED, QCDQ, STABLEHLO
from bqat_jax.export import Frozen, Normalization, export_stablehlo, freeze, load
from bqat_jax.export.checkpoint import to_bytes
from bqat_jax.export.onnx import export_onnx
from bqat_jax.export.verification import fake_quantized

OPSET_OF_TWO_BITS = 25


def freeze_bench(bench: Bench) -> Frozen:
    """Returns a benchmark's calibrated network as plain arrays."""
    experiment, phase = bench.experiment, bench.phase
    data = experiment.data
    normalization, inputs = None, experiment.network.inputs
    if not data.images.is_tokens:
        normalization = Normalization(data.mean, data.std)
        inputs = jax.ShapeDtypeStruct(data.images.image_shape, np.uint8)
    quantization = phase.spec.replacement.quantization
    return freeze(experiment.network, quantization, bench.state.variables, normalization=normalization, inputs=inputs)


def contents(bench: Bench, frozen: Frozen, formats: list[str]) -> dict[str, bytes]:
    """Returns the files of all formats; for ONNX also one with the opset that has 2-bit integers."""
    network, files = bench.experiment.network, {}
    for name in formats:
        if name == PACKED:
            files[name] = to_bytes(frozen)
        elif name == STABLEHLO:
            files[name] = export_stablehlo(frozen, network)
        else:
            files[name] = export_onnx(frozen, network, qcdq=name == QCDQ).SerializeToString()
    if 'onnx' in formats:
        model = export_onnx(frozen, network, opset=OPSET_OF_TWO_BITS)
        files[f'onnx, opset {OPSET_OF_TWO_BITS}'] = model.SerializeToString()
    return files


def programs(bench: Bench, frozen: Frozen, files: dict[str, bytes], folder: Path) -> dict[str, Callable[[Any], Any]]:
    """Returns every format in its runtime, and the full-precision and fake-quantized networks."""
    network, variables = bench.experiment.network, bench.state.variables
    normalization = frozen.normalization

    def prepare(inputs):
        return inputs if normalization is None else normalize(inputs, normalization.mean, normalization.std)

    full = jax.jit(lambda inputs: network.apply(variables.of_network, prepare(inputs), train=False)[0])
    low, _ = fake_quantized(network, bench.phase.spec.replacement.quantization, variables, prepare)
    runs: dict[str, Callable[[Any], Any]] = {'full precision': full, 'fake-quantized': low}
    for name, content in files.items():
        path = folder / f'{len(runs)}{Path(FILES[name.partition(",")[0]]).suffix}'
        path.write_bytes(content)
        if name == PACKED:
            for arithmetic in ('float32', 'int8'):
                runs[f'{name}, {arithmetic}'] = load(path, network, arithmetic).run
        else:
            runs[name] = load(path).run
    return runs


def measure(runs: dict[str, Callable[[Any], Any]], inputs: Any, repeats: int) -> dict[str, float]:
    """Returns the median seconds per batch of every program; programs take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(inputs))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: list[str]) -> None:
    """Prints sizes and seconds as JSON."""
    del argv
    _, config = load_recipe(flags.FLAGS.config)
    config.train.batch_size = flags.FLAGS.batch
    config.mesh.data = 1
    bench = make_bench(config, with_arrays=True)
    frozen = freeze_bench(bench)
    files = contents(bench, frozen, flags.FLAGS.formats)
    report: dict[str, Any] = {
        'config': flags.FLAGS.config,
        'bytes': {
            'float32': frozen.float32_size,
            'ideal': frozen.ideal_size,
            **{name: len(content) for name, content in files.items()},
        },
    }
    if flags.FLAGS.repeats:
        images = bench.batch.get('image')
        inputs = np.asarray(bench.batch['tokens'][:, :-1].astype('int32') if images is None else images)
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(programs(bench, frozen, files, Path(folder)), inputs, flags.FLAGS.repeats)
        report['examples_per_second'] = {name: round(len(inputs) / value, 1) for name, value in seconds.items()}
    print(json.dumps(report, indent=2))


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string('config', 'configs/digits.py', 'Recipe, with arguments after a colon.')
    flags.DEFINE_list('formats', list(FILES), 'Formats to write.')
    flags.DEFINE_integer('batch', 32, 'Batch size.', lower_bound=1)
    flags.DEFINE_integer('repeats', 7, 'Turns that are measured; 0 for sizes only.', lower_bound=0)


if __name__ == '__main__':
    define_flags()
    app.run(main, argv=sys.argv)
