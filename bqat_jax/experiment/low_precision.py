"""The low-precision network's phase: quantizers from rules and data, calibration, block-replaced training."""

from typing import Any

import jax

from bqat_jax.data.augmentation import normalize
from bqat_jax.data.pipeline import get_examples
from bqat_jax.distributed.preemption import StopRequest
from bqat_jax.distributed.processes import agree, put_batch, write_once
from bqat_jax.distributed.sharding import over_batch
from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Restored
from bqat_jax.experiment.experiment import Setting
from bqat_jax.experiment.loop import Phase, run_phase
from bqat_jax.experiment.partner import Partner
from bqat_jax.quantizers import describe_quantizer
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.storage import read_json
from bqat_jax.training.optimizer import NETWORK, QUANTIZERS
from bqat_jax.training.step import Problem
from bqat_jax.transform import (
    LayerQuantizers,
    Quantization,
    build_quantization,
    calibrate,
    find_signed_inputs,
    init_quantizers,
)

QUANTIZERS_FILE = 'quantizers.json'
CHECKPOINTS = 'checkpoints'
# Numbers of this phase's uses of randomness; see `Setting.key`.
TRAIN, CALIBRATION = 2, 3


def train_low_precision(setting: Setting, partner: Partner, stop: StopRequest) -> tuple[Phase, Restored]:
    """Trains the low-precision network, which starts from the partner's weights.

    Returns:
        The phase, and the checkpoint that counts.

    Raises:
        UserError: as `run_phase`.
        Stopped: as `run_phase`.
    """

    def run(params, batch):
        variables = {**partner.variables, 'params': params}
        return setting.network.apply(variables, batch, setting.network.names, train=True, key=setting.key(CALIBRATION))

    batches = None
    path = setting.workdir / QUANTIZERS_FILE
    if not agree(path.exists()):
        batches = _calibration_batches(setting, partner, 0)
        layers = setting.found.quantizable
        signed = find_signed_inputs(run, partner.variables['params'], batches, layers, setting.layers)
        write_once(path, _describe(_build(setting, signed)))
        stop.check('before the quantizers were calibrated')
    phase = low_precision_phase(setting, partner)
    quantization = phase.problem.replacement.quantization

    def init(replica):
        setting.console.print('Calibrating the quantizers.')
        images = batches if batches and replica == 0 else _calibration_batches(setting, partner, replica)
        params = partner.variables['params']
        try:
            quantizers = calibrate(quantization, params, run, images)
        except ValueError as error:
            raise UserError(str(error)) from error
        return {NETWORK: params, QUANTIZERS: quantizers}, partner.variables['batch_stats']

    return phase, run_phase(setting, phase, init, quantizer_shapes(setting, quantization), stop)


def low_precision_phase(setting: Setting, partner: Partner) -> Phase:
    """Returns the phase, with the quantizers that the workdir's quantizers.json describes.

    Raises:
        UserError: if there is no such file yet.
    """
    path = setting.workdir / QUANTIZERS_FILE
    if not path.exists():
        raise UserError(f'{setting.workdir} holds no low-precision network yet: train first (--mode=train).')
    described = read_json(path)
    signed = {path: layer['activations']['signed'] for path, layer in described.items() if layer['activations']}
    return make_phase(setting, partner, signed)


def make_phase(setting: Setting, partner: Partner, signed: dict[str, bool]) -> Phase:
    """Returns the phase.

    Args:
        setting: of the run.
        partner: its facts are read, and its variables are the phase's.
        signed: for every layer whose input is quantized, whether that can be negative.
    """
    config = setting.config
    return Phase(
        name='train',
        purpose=TRAIN,
        problem=Problem(
            replacement=BlockReplacement(setting.network, _build(setting, signed), setting.plan, setting.objective),
            # The low-precision network starts from the partner's weights, so it sees images as the partner does.
            preprocessing=setting.preprocessing(partner.facts['mean'], partner.facts['std']),
            steps=setting.steps(config.train),
            regularizers=setting.regularizers,
            draw_seed=config.replacement.seed,
            microbatches=config.train.microbatches,
            batch_norm_groups=config.train.batch_norm_groups,
        ),
        partner=partner.variables,
        steps=setting.steps(config.train),
        optimizer=config.optimizer,
        directory=setting.workdir / CHECKPOINTS,
        replicas=setting.replicas,
    )


def _build(setting: Setting, signed: dict[str, bool]) -> Quantization:
    """The quantizers, where the config's are defined for their layers."""
    try:
        return build_quantization(setting.found.quantizable, setting.layers, signed)
    except ValueError as error:
        raise UserError(str(error)) from error


def quantizer_shapes(setting: Setting, quantization: Quantization) -> Any:
    """Returns the shapes and dtypes of the quantizers' parameters."""
    variables = setting.abstract_variables
    batch = jax.ShapeDtypeStruct((1, *setting.images.image_shape), 'float32')

    def init(variables, batch):
        def run(params, batch):
            network = setting.network
            return network.apply({**variables, 'params': params}, batch, network.names, train=False)

        return init_quantizers(quantization, variables['params'], run, batch)

    return jax.eval_shape(init, variables, batch)


def _calibration_batches(setting: Setting, partner: Partner, replica: int) -> list[jax.Array]:
    """Normalised training images, not augmented."""
    split, config = setting.train_split, setting.config
    how = setting.preprocessing(partner.facts['mean'], partner.facts['std'])

    @jax.jit
    def images_of(batch, arrays):
        return normalize(get_examples(batch, arrays)[0], how.mean, how.std)

    batches = split.training_batches(
        setting.data_seed(CALIBRATION, replica),
        config.train.batch_size,
        0,
        config.quant.calibration_batches,
        random_crops=False,
    )
    return [images_of(put_batch(batch, over_batch(setting.mesh)), split.arrays) for batch in batches]


def _describe(quantization: Quantization) -> dict[str, Any]:
    """The quantizers of every layer as JSON."""

    def describe(quantizer):
        return None if quantizer is None else describe_quantizer(quantizer)

    def describe_layer(layer: LayerQuantizers):
        described = {'weights': describe(layer.weights), 'activations': describe(layer.activations)}
        return described if layer.rescale == 'none' else {**described, 'rescale': layer.rescale}

    return {path: describe_layer(layer) for path, layer in quantization.layers.items()}
