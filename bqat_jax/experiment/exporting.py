"""Exports what a run trained: files, and a report of how large they are and how far they agree with the network."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.data.augmentation import normalize
from bqat_jax.data.pipeline import Split
from bqat_jax.data.preprocessing import TokenPreprocessing, get_array
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.environment import describe_environment
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.finished import Finished, collections_to_evaluate, open_run
from bqat_jax.experiment.partner import make_preprocessing
from bqat_jax.experiment.reading import load_split
from bqat_jax.export.checkpoint import to_bytes
from bqat_jax.export.freezing import freeze
from bqat_jax.export.frozen import Frozen, Normalization
from bqat_jax.export.inference import Program, arrays_of
from bqat_jax.export.loading import load
from bqat_jax.export.onnx import check_qcdq, export_onnx
from bqat_jax.export.stablehlo import export_stablehlo
from bqat_jax.export.verification import Agreement, Run, compare, fake_quantized
from bqat_jax.export.watching import Watch
from bqat_jax.networks import make_network
from bqat_jax.registry import suggest
from bqat_jax.replacement.tasks import Task
from bqat_jax.storage import write_bytes, write_json

DIRECTORY = 'export'
REPORT = 'report.json'
PACKED, STABLEHLO, ONNX, QCDQ = 'packed', 'stablehlo', 'onnx', 'qcdq'
FILES = {PACKED: 'model.safetensors', STABLEHLO: 'model.stablehlo', ONNX: 'model.onnx', QCDQ: 'model_qcdq.onnx'}
RUNTIMES = {PACKED: 'JAX', STABLEHLO: 'JAX', ONNX: 'onnxruntime', QCDQ: 'onnxruntime'}
# The codes of all layers are held for so many examples at once.
MOST_WATCHED = 32
TABLE_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """What is exported.

    Attributes:
        formats: of `FILES`, without repetition.
        batch: examples that a program takes at once; 0 for any number.
        opset: of ONNX.
    """

    formats: tuple[str, ...]
    batch: int
    opset: int


class Model(NamedTuple):
    """A network in one format, in the runtime that will run it.

    Attributes:
        run: from a batch of inputs to outputs.
        run_with_codes: the same with the codes of layers' inputs.
    """

    run: Callable[[Any], Any]
    run_with_codes: Callable[[Any], Run]


class Network(NamedTuple):
    """What is exported, as it was trained.

    Attributes:
        network: computes in float32.
        frozen: the network as arrays.
        reference: the fake-quantized network.
    """

    network: BlockNetwork
    frozen: Frozen
    reference: Model


def export_run(config: Config, workdir: Path) -> dict[str, Any]:
    """Exports the selected checkpoint of a finished run, with the batch statistics that `--mode=evaluate` uses.

    Writes the files and `export/report.json`, prints a table, and returns the paths of the files. With replicas the
    first one is exported.

    Args:
        config: of the run, with what is exported in `config.export`.
        workdir: of the run.

    Raises:
        UserError: for a run that has not finished, several processes, or what a format cannot say.
    """
    spec = read_spec(config)
    if jax.process_count() > 1:
        raise UserError('--mode=export runs in one process: leave config.distributed at its default, off.')
    console = rich.console.Console(markup=False)
    experiment, finished = open_run(config, workdir, console)
    if not (workdir / 'result.json').is_file():
        raise UserError(
            f'{workdir} holds a run that has not finished: there is no result.json. Finish it first, by the same '
            'command with --mode=train.'
        )
    try:
        exported = _freeze(experiment, finished)
        console.print(f'Writing {", ".join(spec.formats)}.')
        contents = write_files(exported, spec, workdir / DIRECTORY)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    report = _report(experiment, finished, exported, spec, contents)
    write_json(workdir / DIRECTORY / REPORT, report)
    _print_report(console, experiment.task, report)
    return {name: str(workdir / DIRECTORY / FILES[name]) for name in spec.formats} | {
        'report': str(workdir / DIRECTORY / REPORT)
    }


def read_spec(config: Config) -> ExportSpec:
    """Returns what `config.export` says.

    Raises:
        UserError: for a format that there is not.
    """
    formats = tuple(dict.fromkeys(name.strip() for name in config.export.formats.split(',') if name.strip()))
    unknown = [name for name in formats if name not in FILES]
    if unknown or not formats:
        what = f'{unknown[0]!r} is no format' if unknown else 'it names no format'
        hint = suggest(unknown[0], FILES) if unknown else ''
        raise UserError(f'export.formats={config.export.formats!r}: {what}; there are {", ".join(FILES)}.{hint}')
    return ExportSpec(formats, config.export.batch, config.export.opset)


def write_files(exported: Network, spec: ExportSpec, directory: Path) -> dict[str, bytes]:
    """Writes a network in every format; all are made before the first is written. Returns the files' contents.

    Raises:
        ValueError: for what a format cannot say.
        ImportError: if a package that a format needs is missing.
    """
    if QCDQ in spec.formats:
        check_qcdq(exported.frozen)
    contents = {name: _content(exported, name, spec) for name in spec.formats}
    directory.mkdir(exist_ok=True)
    for name, content in contents.items():
        write_bytes(directory / FILES[name], content)
    return contents


def _content(exported: Network, name: str, spec: ExportSpec) -> bytes:
    network, frozen, _ = exported
    if name == PACKED:
        return to_bytes(frozen)
    if name == STABLEHLO:
        return export_stablehlo(frozen, network, batch=spec.batch)
    model = export_onnx(frozen, network, batch=spec.batch, opset=spec.opset, qcdq=name == QCDQ)
    return model.SerializeToString()


def _freeze(experiment: Experiment, finished: Finished) -> Network:
    partner, phase, restored = finished
    data, task_spec = experiment.data, phase.spec
    train = load_split(experiment, data.images.train) if experiment.reestimation_batches else None
    collections = phase.replicas.first(collections_to_evaluate(experiment, finished, train))
    variables = phase.replicas.first(restored.state).variables._replace(collections=collections)
    network, description = _in_float32(experiment)
    quantization = task_spec.replacement.quantization
    normalization, inputs, prepare = None, network.inputs, lambda inputs: inputs
    if not data.images.is_tokens:
        preprocessing: Any = make_preprocessing(experiment, partner.facts)
        mean, std = preprocessing.mean, preprocessing.std
        normalization = Normalization(mean, std)
        inputs = jax.ShapeDtypeStruct(data.images.image_shape, np.dtype(data.images.dtype))

        def prepare(images):
            return normalize(images, mean, std)

    # On the host: what runs on a mesh is laid out there.
    variables = jax.device_get(variables)
    frozen = freeze(
        network,
        quantization,
        variables,
        normalization=normalization,
        inputs=inputs,
        description=None if experiment.plugins else description,
    )
    run, run_with_codes = fake_quantized(network, quantization, variables, prepare)
    return Network(network, frozen, Model(run, run_with_codes))


def _in_float32(experiment: Experiment) -> tuple[BlockNetwork, dict[str, Any]]:
    """The network, computing in float32 on one device, and what builds it."""
    config, images = experiment.config, experiment.data.images
    options = {key: value for key, value in config['network'].items() if key != 'name'}
    if 'dtype' in options:
        options['dtype'] = 'float32'
    cut = config['replacement']['cut']
    network = make_network(config['network']['name'], images.num_classes, cut, options)
    facts = {'name': config['network']['name'], 'num_classes': images.num_classes, 'cut': cut, 'options': options}
    return with_inputs(network, images.inputs), facts


def _report(
    experiment: Experiment, finished: Finished, exported: Network, spec: ExportSpec, contents: Mapping[str, bytes]
) -> dict[str, Any]:
    """Runs every format on the test split, in the runtime that will run it."""
    frozen, console = exported.frozen, experiment.console
    test = load_split(experiment, experiment.data.images.test)
    modes = [layer.mode for layer in frozen.layers.values()]
    report: dict[str, Any] = {
        'checkpoint_step': finished.restored.step,
        'bytes_float32': frozen.float32_size,
        'bytes_ideal': frozen.ideal_size,
        'layers': {mode: modes.count(mode) for mode in dict.fromkeys(modes)},
        'trained_in': experiment.config['network'].get('dtype', 'float32'),
        'environment': describe_environment(experiment),
        'fake_quantized': {},
        'formats': {},
    }
    size = spec.batch or min(MOST_WATCHED, experiment.data.batch_size)
    models = {name: _open(exported, name, spec, experiment.workdir / DIRECTORY) for name in spec.formats}
    console.print(f'Running {", ".join(["the fake-quantized network", *models])} on the test split.')
    measured = _measure(experiment, finished, exported.reference, models, test, size)
    for name, facts in measured.items():
        if name == '':
            report['fake_quantized'] = facts
            continue
        own = len(contents[name])
        sizes = {'bytes': own, 'of_float32': own / frozen.float32_size, 'of_ideal': own / frozen.ideal_size}
        report['formats'][name] = {'file': FILES[name], 'runtime': RUNTIMES[name], **sizes, **facts}
    return report


def _open(exported: Network, name: str, spec: ExportSpec, directory: Path) -> Model:
    """A written file in its runtime, and a second one of the same format that gives the codes too."""
    network, frozen, _ = exported
    path = directory / FILES[name]
    if name == PACKED:
        watched = jax.jit(Program(frozen, network).run_with_codes)
        arrays = jax.device_put(arrays_of(frozen))
        return Model(load(path, network).run, lambda inputs: Run(*watched(arrays, inputs)))
    if name == STABLEHLO:
        content = export_stablehlo(frozen, network, batch=spec.batch, with_codes=True)
        program = jax.jit(jax.export.deserialize(bytearray(content)).call)
        return Model(load(path).run, lambda inputs: Run(*program(inputs)))
    return Model(load(path).run, _watched_onnx(exported, name, spec))


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


class _Tally:
    """Sums over the batches of the test split, of one model."""

    def __init__(self):
        self.counts: dict[str, Any] = {}
        self.agreement = Agreement()
        self.seconds, self.examples = 0.0, 0

    def add(self, counts: Mapping[str, Any]) -> None:
        for name, value in counts.items():
            wide = np.asarray(value, np.float64 if np.issubdtype(value.dtype, np.floating) else np.int64)
            self.counts[name] = self.counts.get(name, 0) + wide


def _measure(
    experiment: Experiment, finished: Finished, reference: Model, models: Mapping[str, Model], test: Split, size: int
) -> dict[str, dict[str, Any]]:
    """What every model gives on the test split, and the fake-quantized network's under ''."""
    task = experiment.task
    count = jax.jit(task.counts)
    everyone = {'': reference, **models}
    tallies = {name: _Tally() for name in everyone}
    is_first = True
    for inputs, targets, mask in _batches(experiment, finished, test, size):
        expected = jax.device_get(reference.run_with_codes(inputs))
        for name, model in everyone.items():
            tally = tallies[name]
            if is_first:
                jax.block_until_ready(model.run(inputs))  # compiles
            start = time.perf_counter()
            outputs = jax.block_until_ready(model.run(inputs))
            tally.seconds += time.perf_counter() - start
            tally.examples += len(mask)
            outputs = jax.device_get(outputs)
            tally.add(jax.device_get(count(outputs, targets, mask)))
            if name:
                codes = jax.device_get(model.run_with_codes(inputs)).codes
                tally.agreement += compare(expected, Run(outputs, codes), mask)
        is_first = False
    return {name: _facts(task, name, tally) for name, tally in tallies.items()}


def _facts(task: Task, name: str, tally: _Tally) -> dict[str, Any]:
    results = task.results(tally.counts)
    facts: dict[str, Any] = {key: results[key] for key in (task.score.name, *task.reported)}
    if name:
        facts |= dataclasses.asdict(tally.agreement)
    return facts | {'examples_per_second': tally.examples / tally.seconds}


def _batches(
    experiment: Experiment, finished: Finished, test: Split, size: int
) -> Iterator[tuple[Any, Any, np.ndarray]]:
    """(inputs as the exported network takes them, targets, mask) of the test split, on the host."""
    preprocessing = make_preprocessing(experiment, finished.partner.facts)
    for batch in test.evaluation_batches(size):
        prepared = preprocessing(batch, test.arrays, None)
        is_tokens = isinstance(preprocessing, TokenPreprocessing)
        inputs = prepared.inputs if is_tokens else get_array(batch, test.arrays, 'image')
        yield np.asarray(inputs), jax.device_get(prepared.targets), np.asarray(batch['mask'])


def _print_report(console: rich.console.Console, task: Task, report: Mapping[str, Any]) -> None:
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

    own = report['fake_quantized']
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
        f'Of {examples} test examples. The ideal is {report["bytes_ideal"]:,} bytes: packed codes, and in float32 what '
        'stays in full precision.',
        soft_wrap=True,
    )
