"""The low-precision network's phase: quantizers from rules and data, calibration, block-replaced training."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.data.pipeline import Split
from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.processes import agree
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Restored
from bqat_jax.experiment.configuration import changed_keys
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.partner import Partner, make_preprocessing
from bqat_jax.experiment.phase import Phase
from bqat_jax.experiment.reading import Data, plain_batches
from bqat_jax.experiment.run_phase import run_phase
from bqat_jax.experiment.streams import Stream, random_key
from bqat_jax.quantizers import describe_quantizer
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.paths import Variables
from bqat_jax.storage import Place, damaged, read_json, write_once
from bqat_jax.training.spec import TrainSpec
from bqat_jax.transform import (
    LayerQuantizers,
    Quantization,
    build_quantization,
    calibrate,
    find_quantization,
    quantizer_shapes,
)

QUANTIZERS_FILE = 'quantizers.json'
CHECKPOINTS = 'checkpoints'


class Start(NamedTuple):
    """The start of the low-precision network.

    Attributes:
        variables: {'params': ..., 'batch_stats': ...}.
        quantizers: the quantizers' parameters; None to calibrate them.
        described: these quantizers as in quantizers.json; None if `quantizers` is None.
    """

    variables: Any
    quantizers: dict[str, Any] | None
    described: dict[str, Any] | None


def train_low_precision(
    experiment: Experiment, partner: Partner, data: Data, find_start: Callable[[], Start], stop: StopRequest
) -> tuple[Phase, Restored]:
    """Trains the low-precision network.

    Args:
        experiment: the experiment.
        partner: the frozen full-precision partner.
        data: the training data.
        find_start: returns what the network starts from; not called once there is a checkpoint.
        stop: checked after calibration and after every step.

    The quantizers are written to a file before training starts; a resumed run builds them from that file.

    Returns:
        The phase, and the selected checkpoint.

    Raises:
        UserError: if quantizers do not fit their layers, or for the reasons of `run_phase`.
        Stopped: after a request to stop.
    """
    path, find_start = experiment.workdir / QUANTIZERS_FILE, functools.cache(find_start)
    # Calibration batches that were already read to find signs, by replica.
    batches: dict[int, list[jax.Array]] = {}
    if agree(path.exists()):
        quantization = read_quantization(experiment)
    else:
        start = find_start()
        if start.described is not None:
            quantization = _same_quantization(experiment, start.described)
        else:
            batches[0] = _calibration_batches(experiment, partner, data.train, 0)
            quantization = _find_quantization(experiment, start, batches[0])
        experiment.hold.check()
        write_once(path, _describe(quantization))
        stop.check('after the quantizers were chosen')
    phase = low_precision_phase(experiment, partner, quantization)

    def init(replica):
        start = find_start()
        if start.quantizers is not None:
            quantizers = start.quantizers
        else:
            read = batches.pop(replica, None) or _calibration_batches(experiment, partner, data.train, replica)
            quantizers = _calibrate(experiment, start, quantization, read)
            stop.check('after the quantizers were calibrated')
        return Variables(start.variables['params'], quantizers, other_collections(start.variables))

    return phase, run_phase(experiment, phase, data, init, stop)


def low_precision_phase(experiment: Experiment, partner: Partner, quantization: Quantization) -> Phase:
    """Returns the phase that trains a quantized network."""
    spec = TrainSpec(
        replacement=BlockReplacement(experiment.network, quantization, experiment.plan, experiment.objective),
        # The low-precision network starts from the partner's weights, so it sees images as the partner does.
        prepare=make_preprocessing(experiment, partner.facts),
        steps=experiment.training.steps,
        regularizers=experiment.regularizers,
        draw_seed=experiment.draw_seed,
        microbatches=experiment.microbatches,
        batch_norm_groups=experiment.batch_norm_groups,
    )
    return Phase(
        name='train',
        stream=Stream.TRAINING,
        spec=spec,
        optimizer=experiment.training.optimizer,
        partner=partner.variables,
        shapes=Variables(
            experiment.shapes['params'],
            quantizer_shapes(quantization, experiment.shapes['params']),
            other_collections(experiment.shapes),
        ),
        directory=experiment.workdir / CHECKPOINTS,
        replicas=experiment.replicas,
    )


def read_quantization(experiment: Experiment) -> Quantization:
    """Returns the quantizers in the workdir's quantizers.json.

    Raises:
        UserError: if the file does not exist yet.
    """
    path = experiment.workdir / QUANTIZERS_FILE
    if not path.exists():
        raise UserError(f'{experiment.workdir} holds no low-precision network yet: train first (--mode=train).')
    return _build_quantization(experiment, read_json(path), path)


def _build_quantization(experiment: Experiment, described: dict[str, Any], file: Place) -> Quantization:
    """The config's quantizers, with the signs of inputs from a quantizers.json."""
    signed = {}
    for path, layer in experiment.quantizers.items():
        if layer.activations is not None:
            try:
                signed[path] = bool(described[path]['activations']['signed'])
            except (KeyError, TypeError) as error:
                raise damaged(file, f'it does not say whether the inputs of {path} are signed') from error
    try:
        return build_quantization(experiment.layers.quantizable, experiment.quantizers, signed)
    except ValueError as error:
        raise UserError(str(error)) from error


def _same_quantization(experiment: Experiment, described: dict[str, Any]) -> Quantization:
    """The config's quantizers; raises UserError unless those of another run equal them."""
    assert experiment.init.workdir is not None
    source = experiment.init.workdir / QUANTIZERS_FILE
    quantization = _build_quantization(experiment, described, source)
    changes = changed_keys(described, _describe(quantization))
    if changes:
        raise UserError(
            f"init.quantizers='keep': the quantizers of {experiment.init.workdir} are not those of this config (there "
            f"-> here): {'; '.join(changes[:3])}. Use init.quantizers='calibrate'."
        )
    return quantization


def _find_quantization(experiment: Experiment, start: Start, batches: list[jax.Array]) -> Quantization:
    """The quantizers, with the signs of their inputs."""
    run, layers, params = _full_precision(experiment, start), experiment.layers.quantizable, start.variables['params']
    try:
        return find_quantization(run, params, batches, layers, experiment.quantizers)
    except ValueError as error:
        raise UserError(str(error)) from error


def _calibrate(
    experiment: Experiment, start: Start, quantization: Quantization, batches: list[jax.Array]
) -> dict[str, Any]:
    """The parameters that a replica's quantizers start from."""
    experiment.console.print('Calibrating the quantizers.')
    try:
        return calibrate(quantization, start.variables['params'], _full_precision(experiment, start), batches)
    except ValueError as error:
        raise UserError(str(error)) from error


def _full_precision(experiment: Experiment, start: Start) -> Any:
    """The full-precision network of `start`, as a function of parameters and a batch of images."""
    key = random_key(experiment.seeds[0], Stream.CALIBRATION)
    return experiment.network.as_function(start.variables, train=True, key=key)


def _calibration_batches(experiment: Experiment, partner: Partner, split: Split, replica: int) -> list[jax.Array]:
    """Normalised training images without augmentation."""
    preprocessing = make_preprocessing(experiment, partner.facts)

    @jax.jit
    def images_of(batch, arrays):
        return preprocessing(batch, arrays, None).inputs

    batches = plain_batches(
        experiment, split, experiment.seeds[replica], Stream.CALIBRATION, experiment.calibration_batches
    )
    return [images_of(batch, split.arrays) for batch in batches]


def _describe(quantization: Quantization) -> dict[str, Any]:
    """The quantizers of every layer as JSON."""

    def describe(quantizer):
        return None if quantizer is None else describe_quantizer(quantizer)

    def describe_layer(layer: LayerQuantizers):
        described = {'weights': describe(layer.weights), 'activations': describe(layer.activations)}
        return described if layer.rescale == 'none' else {**described, 'rescale': layer.rescale}

    return {path: describe_layer(layer) for path, layer in quantization.layers.items()}
