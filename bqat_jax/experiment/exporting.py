"""Exports a trained network: files, and a report of their sizes and their agreement with the network."""

import importlib.util
from typing import Any

import jax
import numpy as np
import rich.console

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.data.augmentation import normalize
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.export_report import (
    DIRECTORY,
    FILES,
    ONNX,
    PACKED,
    QCDQ,
    REPORT,
    STABLEHLO,
    ExportSpec,
    Model,
    Network,
    make_report,
    print_report,
)
from bqat_jax.experiment.finished import Finished, collections_to_evaluate, open_run
from bqat_jax.experiment.partner import make_preprocessing
from bqat_jax.experiment.reading import load_split
from bqat_jax.export.checkpoint import to_bytes
from bqat_jax.export.freezing import freeze
from bqat_jax.export.frozen import Normalization
from bqat_jax.export.onnx import check_qcdq, export_onnx
from bqat_jax.export.stablehlo import export_stablehlo
from bqat_jax.export.verification import fake_quantized
from bqat_jax.networks import make_network
from bqat_jax.registry import suggest
from bqat_jax.storage import Place, check_reachable, write_bytes, write_json


def export_run(config: Config, workdir: Place) -> dict[str, Any]:
    """Exports the selected checkpoint of a finished run, with the batch statistics that `--mode=evaluate` uses.

    Writes the files and `export/report.json`, prints a table, and returns the paths of the files. With replicas the
    first one is exported.

    Args:
        config: the run's config; `config.export` has the options.
        workdir: the run's workdir.

    Raises:
        UserError: for a run that has not finished, several processes, or a network that a format cannot represent.
    """
    spec = read_spec(config)
    if jax.process_count() > 1:
        raise UserError('--mode=export runs in one process: leave config.distributed at its default, off.')
    console = rich.console.Console(markup=False)
    check_reachable(workdir, '--workdir')
    experiment, finished = open_run(config, workdir, console)
    if not (workdir / 'result.json').is_file():
        raise UserError(
            f'{workdir} holds a run that has not finished: there is no result.json. Finish it with --mode=train and '
            'the same flags.'
        )
    try:
        exported = freeze_run(experiment, finished)
        console.print(f'Writing {", ".join(spec.formats)}.')
        contents = write_files(exported, spec, workdir / DIRECTORY)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    sizes = {name: len(content) for name, content in contents.items()}
    report = make_report(experiment, finished, exported, spec, sizes)
    write_json(workdir / DIRECTORY / REPORT, report)
    print_report(console, experiment.task, report)
    return {name: str(workdir / DIRECTORY / FILES[name]) for name in spec.formats} | {
        'report': str(workdir / DIRECTORY / REPORT)
    }


def read_spec(config: Config) -> ExportSpec:
    """Returns the options in `config.export`.

    Raises:
        UserError: for an unknown format, or none.
    """
    formats = tuple(dict.fromkeys(name.strip() for name in config.export.formats.split(',') if name.strip()))
    unknown = [name for name in formats if name not in FILES]
    if unknown or not formats:
        what = f'{unknown[0]!r} is not a format' if unknown else 'it names no format'
        hint = suggest(unknown[0], FILES) if unknown else ''
        raise UserError(f'export.formats={config.export.formats!r}: {what}; there are {", ".join(FILES)}.{hint}')
    return ExportSpec(formats, config.export.batch, config.export.opset)


def write_files(exported: Network, spec: ExportSpec, directory: Place) -> dict[str, bytes]:
    """Writes a network in every format and returns the files' contents; all are made before the first is written.

    Raises:
        ValueError: if a format cannot represent the network.
        ImportError: if a package that a format needs is missing.
    """
    if QCDQ in spec.formats:
        check_qcdq(exported.frozen)
    if {ONNX, QCDQ} & set(spec.formats) and importlib.util.find_spec('onnxruntime') is None:
        raise ImportError('An export to ONNX is checked with onnxruntime: pip install onnx onnxruntime.')
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


def freeze_run(experiment: Experiment, finished: Finished) -> Network:
    """Freezes the selected checkpoint of a run, with the batch statistics that evaluation uses.

    Raises:
        ValueError: for a network that cannot be frozen.
    """
    partner, phase, restored = finished
    data, task_spec = experiment.data, phase.spec
    train = load_split(experiment, data.images.train) if experiment.reestimation_batches else None
    collections = phase.replicas.first(collections_to_evaluate(experiment, finished, train))
    variables = phase.replicas.first(restored.state).variables._replace(collections=collections)
    network, description = _in_float32(experiment)
    quantization = task_spec.replacement.quantization
    normalization, inputs, prepare = None, network.inputs, _as_they_are
    if not data.images.is_tokens:
        preprocessing: Any = make_preprocessing(experiment, partner.facts)
        mean, std = preprocessing.mean, preprocessing.std
        normalization = Normalization(mean, std)
        inputs = jax.ShapeDtypeStruct(data.images.image_shape, np.dtype(data.images.dtype))

        def prepare(inputs):
            return normalize(inputs, mean, std)

    # On the host, so that nothing stays sharded over the mesh.
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


def _as_they_are(inputs: Any) -> Any:
    return inputs


def _in_float32(experiment: Experiment) -> tuple[BlockNetwork, dict[str, Any]]:
    """The network, computing in float32 on one device, and the description that rebuilds it."""
    config, images = experiment.config, experiment.data.images
    options = {key: value for key, value in config['network'].items() if key != 'name'}
    if 'dtype' in options:
        options['dtype'] = 'float32'
    cut = config['replacement']['cut']
    network = make_network(config['network']['name'], images.num_classes, cut, options)
    facts = {'name': config['network']['name'], 'num_classes': images.num_classes, 'cut': cut, 'options': options}
    return with_inputs(network, images.inputs), facts
