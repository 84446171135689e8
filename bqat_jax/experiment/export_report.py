"""Runs exported files on the test split in their runtimes and measures how far they agree with the trained network."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.data.pipeline import Split
from bqat_jax.data.preprocessing import TokenPreprocessing, get_array
from bqat_jax.experiment.environment import describe_environment
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.finished import Finished
from bqat_jax.experiment.partner import make_preprocessing
from bqat_jax.experiment.reading import load_split
from bqat_jax.export.frozen import Frozen
from bqat_jax.export.inference import Program, arrays_of
from bqat_jax.export.loading import load
from bqat_jax.export.onnx import export_onnx
from bqat_jax.export.stablehlo import export_stablehlo
from bqat_jax.export.verification import Agreement, Run, compare
from bqat_jax.export.watching import Watch
from bqat_jax.replacement.tasks import Task
from bqat_jax.storage import Place, fetched
from bqat_jax.training.evaluation import add_counts

DIRECTORY, REPORT = 'export', 'report.json'
PACKED, STABLEHLO, ONNX, QCDQ = 'packed', 'stablehlo', 'onnx', 'qcdq'
FILES = {PACKED: 'model.safetensors', STABLEHLO: 'model.stablehlo', ONNX: 'model.onnx', QCDQ: 'model_qcdq.onnx'}
RUNTIMES = {PACKED: 'jax', STABLEHLO: 'jax', ONNX: 'onnxruntime', QCDQ: 'onnxruntime'}
# The network that all formats are compared with.
REFERENCE = 'fake_quantized'
# Batch size of the comparison: memory holds the codes of all layers for this many examples.
MOST_WATCHED = 32
TABLE_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """The options of an export.

    Attributes:
        formats: keys of `FILES`, without repetition.
        batch: fixed batch size of exported programs; 0 for any.
        opset: version of the ONNX operators.
    """

    formats: tuple[str, ...]
    batch: int
    opset: int


class Model(NamedTuple):
    """A network in one format, opened in its runtime.

    Attributes:
        run: from a batch of inputs to outputs.
        run_with_codes: from a batch of inputs to outputs and the codes of the layers' inputs.
    """

    run: Callable[[Any], Any]
    run_with_codes: Callable[[Any], Run]


class Network(NamedTuple):
    """A trained network, ready to be exported.

    Attributes:
        network: computes in float32.
        frozen: the network as arrays.
        reference: the fake-quantized network.
    """

    network: BlockNetwork
    frozen: Frozen
    reference: Model


NOTHING = Agreement()


@dataclasses.dataclass(frozen=True)
class Tally:
    """Accumulated results of a model.

    Attributes:
        counts: the task's counts, summed.
        agreement: agreement with the fake-quantized network.
        examples: examples run, including padding.
        seconds: time taken for them.
    """

    counts: Any = None
    agreement: Agreement = NOTHING
    examples: int = 0
    seconds: float = 0.0


def make_report(
    experiment: Experiment, finished: Finished, exported: Network, spec: ExportSpec, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Returns the report of an export, as JSON.

    Args:
        experiment: the experiment.
        finished: its trained network.
        exported: the network.
        spec: options of the export, whose files must be written.
        sizes: bytes of every format's file.
    """
    frozen = exported.frozen
    modes = [layer.mode for layer in frozen.layers.values()]
    models = {name: open_model(exported, name, spec, experiment.workdir / DIRECTORY) for name in spec.formats}
    experiment.console.print(f'Running {", ".join(["the fake-quantized network", *models])} on the test split.')
    size = spec.batch or min(MOST_WATCHED, experiment.data.batch_size)
    tallies = measure(experiment, finished, {REFERENCE: exported.reference, **models}, size)
    formats = {}
    for name in spec.formats:
        own = sizes[name]
        formats[name] = {
            'file': FILES[name],
            'runtime': f'{RUNTIMES[name]} {importlib.metadata.version(RUNTIMES[name])}',
            'bytes': own,
            'of_float32': own / frozen.float32_size,
            'of_ideal': own / frozen.ideal_size,
            **_results(experiment.task, tallies[name]),
            **dataclasses.asdict(tallies[name].agreement),
        }
    return {
        'checkpoint_step': finished.restored.step,
        'bytes_float32': frozen.float32_size,
        'bytes_ideal': frozen.ideal_size,
        'layers': {mode: modes.count(mode) for mode in dict.fromkeys(modes)},
        'measured_batch': size,
        'trained_in': experiment.config['network'].get('dtype', 'float32'),
        'files_of_earlier_exports': [
            FILES[name]
            for name in FILES
            if name not in spec.formats and (experiment.workdir / DIRECTORY / FILES[name]).exists()
        ],
        REFERENCE: _results(experiment.task, tallies[REFERENCE]),
        'formats': formats,
        'environment': describe_environment(experiment),
    }


def open_model(exported: Network, name: str, spec: ExportSpec, directory: Place) -> Model:
    """Opens an exported file in its runtime; codes come from a second program in that format.

    Args:
        exported: the network.
        name: the format.
        spec: options of the export.
        directory: folder of the files.
    """
    network, frozen, _ = exported
    with fetched(directory / FILES[name]) as path:
        opened = load(path, network if name == PACKED else None)
    if name == PACKED:
        watched = jax.jit(Program(frozen, network).run_with_codes)
        arrays = jax.device_put(arrays_of(frozen))
        return Model(opened.run, lambda inputs: Run(*watched(arrays, inputs)))
    if name == STABLEHLO:
        content = export_stablehlo(frozen, network, batch=spec.batch, with_codes=True)
        program = jax.jit(jax.export.deserialize(bytearray(content)).call)
        return Model(opened.run, lambda inputs: Run(*program(inputs)))
    return Model(opened.run, _watched_onnx(exported, name, spec))


def _watched_onnx(exported: Network, name: str, spec: ExportSpec) -> Callable[[Any], Run]:
    import onnxruntime

    network, frozen, _ = exported
    watch = Watch()
    model = export_onnx(frozen, network, batch=spec.batch, opset=spec.opset, qcdq=name == QCDQ, watch=watch)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
    (given,), names = session.get_inputs(), [x.name for x in session.get_outputs()]

    def run(inputs):
        results = dict(zip(names, session.run(names, {given.name: np.asarray(inputs)}), strict=True))
        codes: dict[str, list[Any]] = {}
        for label, value in results.items():
            if '@' in label:
                codes.setdefault(watch.path_of(label), []).append(value)
        return Run(results['output'], codes)

    return run


def measure(experiment: Experiment, finished: Finished, models: Mapping[str, Model], size: int) -> dict[str, Tally]:
    """Runs models on the test split and compares each with the first.

    Args:
        experiment: gives the test split and the task.
        finished: the trained network.
        models: models by name; the first is the reference.
        size: batch size.
    """
    test = load_split(experiment, experiment.data.images.test)
    count, reference = jax.jit(experiment.task.counts), next(iter(models.values()))
    tallies = dict.fromkeys(models, Tally())
    for number, (inputs, targets, mask) in enumerate(_batches(experiment, finished, test, size)):
        expected = jax.device_get(reference.run_with_codes(inputs))
        for name, model in models.items():
            before = tallies[name]
            if number == 0:
                jax.block_until_ready(model.run(inputs))  # compiles
            start = time.perf_counter()
            outputs = jax.block_until_ready(model.run(inputs))
            seconds = time.perf_counter() - start
            codes = jax.device_get(model.run_with_codes(inputs)).codes
            agreement = compare(expected, Run(jax.device_get(outputs), codes), mask)
            tallies[name] = Tally(
                add_counts(before.counts, count(outputs, targets, mask)),
                before.agreement + agreement,
                before.examples + len(mask),
                before.seconds + seconds,
            )
    return tallies


def _results(task: Task, tally: Tally) -> dict[str, Any]:
    results = task.results(tally.counts)
    known = {name: results[name] for name in (task.score.name, *task.reported)}
    return known | {'examples_per_second': tally.examples / tally.seconds}


def _batches(
    experiment: Experiment, finished: Finished, test: Split, size: int
) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """Yields (inputs of the exported network, targets, mask) of the test split, on the host."""
    preprocessing = make_preprocessing(experiment, finished.partner.facts)
    for batch in test.evaluation_batches(size):
        prepared = preprocessing(batch, test.arrays, None)
        is_tokens = isinstance(preprocessing, TokenPreprocessing)
        inputs = prepared.inputs if is_tokens else get_array(batch, test.arrays, 'image')
        yield np.asarray(inputs), jax.device_get(prepared.targets), np.asarray(batch['mask'])


def print_report(console: rich.console.Console, task: Task, report: Mapping[str, Any]) -> None:
    """Prints a report as a table."""
    if not console.is_terminal:
        console = rich.console.Console(width=TABLE_WIDTH, file=console.file, markup=False)
    table = rich.table.Table(title='Exported', box=rich.box.SIMPLE_HEAD)
    table.add_column('format')
    columns = ('bytes', 'of float32', task.score.title, 'codes differ', 'answers differ', 'largest difference', 'ex/s')
    for name in columns:
        table.add_column(name, justify='right')

    def score(value):
        return f'{value:.2%}' if task.score.is_fraction else f'{value:.4f}'

    def number(value):
        return '-' if value is None else f'{value}'

    own = report[REFERENCE]
    rate = f'{own["examples_per_second"]:.0f}'
    table.add_row(
        'fake-quantized', f'{report["bytes_float32"]:,}', '100.0%', score(own[task.score.name]), '', '', '', rate
    )
    for name, facts in report['formats'].items():
        table.add_row(
            name,
            f'{facts["bytes"]:,}',
            f'{facts["of_float32"]:.1%}',
            score(facts[task.score.name]),
            number(facts['codes_differ']),
            number(facts['answers_differ']),
            f'{facts["difference"]:.2g}',
            f'{facts["examples_per_second"]:.0f}',
        )
    console.print(table)
    examples = next(iter(report['formats'].values()))['examples']
    console.print(
        f'Differences from the fake-quantized network are counted on {examples} test examples in batches of '
        f'{report["measured_batch"]}. The smallest possible size is {report["bytes_ideal"]:,} bytes: packed codes, '
        'and float32 for what stays in full precision.',
        soft_wrap=True,
    )
    if report['files_of_earlier_exports']:
        console.print(f'From an earlier export: {", ".join(report["files_of_earlier_exports"])}.', soft_wrap=True)
