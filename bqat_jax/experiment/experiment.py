"""From a config to the objects it stands for; one that cannot work is refused before anything is computed."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
from jax.sharding import Mesh

from bqat_jax.analysis.measurement import DiagnosisSettings
from bqat_jax.blocks.block_network import CutNetwork
from bqat_jax.data.pipeline import Damage, Share, Split, read_whole
from bqat_jax.data.sources import ImageData, Subset, load_images
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.distributed.sharding import Placement, make_mesh, parse_rules, replicated
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, duration, to_plain
from bqat_jax.networks.registry import make_network
from bqat_jax.plugins import load_plugins
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.objective import WEIGHTS, Objective
from bqat_jax.replacement.plans import Plan, parse_path_weights
from bqat_jax.replacement.schedules import get_schedule
from bqat_jax.training.optimizer import check_optimizer
from bqat_jax.training.regularizers import Regularizers
from bqat_jax.training.step import Preprocessing
from bqat_jax.training.strengths import TraceSettings
from bqat_jax.transform import FULL_PRECISION, Layers, find_layers
from bqat_jax.transform.rules import LayerSettings, assign_quantizers

LEAST = {
    'seed': 0,
    'data.workers': 0,
    'data.crop_padding': 0,
    'data.color_jitter': 0,
    'train.batch_size': 1,
    'train.microbatches': 1,
    'train.batch_norm_groups': 1,
    'train.replicas': 1,
    'train.log_every_steps': 1,
    'checkpoint.keep': 1,
    'quant.calibration_batches': 1,
    'quant.reestimation_batches': 0,
    'replacement.seed': 0,
    'mesh.least_elements': 0,
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a config comes to.

    Attributes:
        config: the resolved config.
        workdir: where everything goes that the run leaves.
        console: where progress is shown.
        placement: the devices, and what lies where on them.
        images: the dataset.
        network: the network, cut into blocks.
        plan: the replacement plan.
        objective: what is minimised.
        found: the network's layers.
        layers: what the rules say of each layer.
        regularizers: what is done about oscillating weights.
        trace: how the strength of estimators that measure one is measured.
        diagnosis: how much is measured by a diagnosis.
        plugins: the user's files that were run.
    """

    config: Config
    workdir: Path
    console: rich.console.Console
    placement: Placement
    images: ImageData
    network: CutNetwork
    plan: Plan
    objective: Objective
    found: Layers
    layers: dict[str, LayerSettings]
    regularizers: Regularizers
    trace: TraceSettings
    diagnosis: DiagnosisSettings
    plugins: tuple[Path, ...]

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.placement.mesh

    @property
    def description(self) -> dict[str, Any]:
        """The network as JSON: what two runs must share for one to take the other's partner."""
        image_shape, num_classes = list(self.images.image_shape), self.images.num_classes
        return {**to_plain(self.config.network), 'image_shape': image_shape, 'num_classes': num_classes}

    @functools.cached_property
    def train_split(self) -> Split:
        """What the network trains on."""
        return self._split(self.images.train)

    @functools.cached_property
    def validation_split(self) -> Split | None:
        """What choices are made on; None if nothing is held out."""
        return self._split(self.images.validation) if len(self.images.validation) else None

    @functools.cached_property
    def test_split(self) -> Split:
        """What is evaluated at the end."""
        return self._split(self.images.test)

    def _split(self, source: Subset) -> Split:
        arrays = None
        if self.config.data.on_device:
            self.console.print(f'Reading {len(source)} images onto the device.')
            arrays = jax.device_put(read_whole(source), replicated(self.mesh))
        share = Share(jax.process_index(), jax.process_count())
        damage = self.damage if self.config.data.skip_damaged else None
        return Split(source, arrays, self.config.data.workers, self.images.crop, share, damage)

    @functools.cached_property
    def damage(self) -> Damage:
        """What could not be read and was skipped."""
        return Damage()

    @property
    def evaluation_batch_size(self) -> int:
        """Examples per evaluation batch: as in training, up to a multiple of the number of devices."""
        devices = self.mesh.devices.size
        return -(-self.config.train.batch_size // devices) * devices

    def steps(self, section: Config, name: str = '') -> int:
        """Returns the duration `section.<name>steps` or `section.<name>epochs` in steps."""
        return duration(section, name, len(self.images.train) / self.config.train.batch_size)

    def preprocessing(self, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
        """Returns the preprocessing of images, with this normalisation."""
        data = self.config.data
        return Preprocessing(tuple(mean), tuple(std), data.crop_padding, data.flip, data.color_jitter)

    @property
    def seeds(self) -> range:
        """The seeds of the replicas."""
        return range(self.config.seed, self.config.seed + self.config.train.replicas)

    @property
    def single(self) -> Replicas:
        """A single run on all devices."""
        return Replicas(1, self.placement)

    @property
    def replicas(self) -> Replicas:
        """The low-precision networks that are trained side by side."""
        return Replicas(self.config.train.replicas, self.placement)

    def key(self, purpose: int, replica: int = 0) -> jax.Array:
        """Returns the random key for a purpose, a number that no other use of randomness has."""
        return jax.random.fold_in(jax.random.key(self.seeds[replica]), purpose)

    def data_seed(self, purpose: int, replica: int = 0) -> int:
        """Returns the seed of the order of examples for a purpose."""
        return int(np.random.SeedSequence([self.seeds[replica], purpose]).generate_state(1)[0])

    @functools.cached_property
    def abstract_variables(self) -> Any:
        """Shapes, dtypes and shardings of the network's variables."""
        shapes = jax.eval_shape(lambda: self.network.init(jax.random.key(0), self.images.image_shape))
        return self.single.stacked_shapes(shapes)


def make_setting(
    config: Config,
    workdir: Path,
    console: rich.console.Console,
    *,
    images: ImageData | None = None,
    devices: Sequence[Any] | None = None,
) -> Setting:
    """Resolves a config.

    Args:
        config: what the command line left of a recipe.
        workdir: where everything goes that the run leaves.
        console: where progress is shown.
        images: the dataset; that which the config names if None.
        devices: those of the mesh; JAX's if None.

    Raises:
        UserError: naming the key, its value and what it may be.
    """
    for key, least in LEAST.items():
        value = functools.reduce(lambda section, name: section[name], key.split('.'), config)
        if value < least:
            raise UserError(f'{key}={value}: it must be at least {least}.')
    if len(config.profile_steps) != 2 or not 1 <= config.profile_steps[0] <= config.profile_steps[1]:
        raise UserError(
            f'profile_steps={tuple(config.profile_steps)}: give the first and the last step to record, counted from 1, '
            'such as (11, 13).'
        )
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    count, microbatches = mesh.devices.size, config.train.microbatches
    if config.train.batch_size % (count * microbatches):
        parts = f' in train.microbatches={microbatches} parts' if microbatches > 1 else ''
        raise UserError(
            f'train.batch_size={config.train.batch_size} cannot be split over {count} devices{parts}; '
            'take a multiple, or fewer devices (mesh.data).'
        )
    if config.train.batch_size // microbatches % config.train.batch_norm_groups:
        raise UserError(
            f'train.batch_norm_groups={config.train.batch_norm_groups} does not divide the '
            f'{config.train.batch_size // microbatches} images that are run at once.'
        )
    if config.train.replicas > 1:
        if config.train.replicas % count:
            raise UserError(
                f'train.replicas={config.train.replicas} cannot be spread over {count} devices; take a '
                'multiple, or fewer devices (mesh.data).'
            )
        if config.mesh.fsdp > 1 or jax.process_count() > 1:
            raise UserError(
                f'train.replicas={config.train.replicas} needs each seed whole on one device of one process; '
                'mesh.fsdp must be 1 and distributed off. Train the seeds one after another instead.'
            )
    if config.data.on_device and config.data.skip_damaged:
        raise UserError(
            'data.skip_damaged=True, data.on_device=True: the whole of a dataset is read onto the device; give '
            '--config.data.on_device=false.'
        )
    if config.data.on_device and config.data.image_size is not None:
        raise UserError(
            f'data.image_size={config.data.image_size}, data.on_device=True: squares are cut out on the way to the '
            'device; give --config.data.on_device=false.'
        )
    images = images or load_images(
        config.data.name,
        config.data.dir,
        config.data.validation_fraction,
        config.data.image_size,
        config.data.test_split,
        config.data.train_examples,
    )
    channels = images.image_shape[-1]
    if len(config.data.mean) != channels or len(config.data.std) != channels or min(config.data.std) <= 0:
        raise UserError(
            f'data.mean={config.data.mean}, data.std={config.data.std}: the images have {channels} channels; give one '
            'number for each, those of std positive.'
        )
    plugins = load_plugins(config.plugins)
    check_optimizer(config.optimizer)
    check_optimizer(config.partner.optimizer)
    try:
        placement = Placement(mesh, parse_rules(config.mesh.rules), config.mesh.least_elements)
        network = _make_network(config, images)
        found = find_network_layers(network, images.image_shape)
        layers = assign_quantizers(
            tuple(found.quantizable), config.quant.weights, config.quant.activations, config.quant.rules
        )
        regularizers = Regularizers(**config.quant.oscillations)
        for path, layer in layers.items():
            if layer.weights is not None:
                quantizer = layer.weights.make(of_weights=True, signed=True)
                regularizers.check(path, quantizer, found.quantizable[path])
        plan = _make_plan(config.replacement, len(network.blocks))
        objective = _make_objective(config.replacement)
        BlockReplacement(network, FULL_PRECISION, plan, objective)  # refuses what does not train
        return Setting(
            config=config,
            workdir=workdir,
            console=console,
            placement=placement,
            images=images,
            network=network,
            plan=plan,
            objective=objective,
            found=found,
            layers=layers,
            regularizers=regularizers,
            trace=TraceSettings(
                config.quant.trace.batches, config.quant.trace.iterations, config.quant.trace.tolerance
            ),
            diagnosis=DiagnosisSettings(
                config.diagnosis.batches, config.diagnosis.samples, config.diagnosis.oscillation_steps
            ),
            plugins=plugins,
        )
    except ValueError as error:  # what the library's parts say of a value holds for the key that gave it
        raise UserError(str(error)) from error


def _make_network(config: Config, images: ImageData) -> CutNetwork:
    options = {key: value for key, value in config.network.items() if key != 'name'}
    return make_network(config.network.name, images.num_classes, config.replacement.cut, options)


def _make_plan(config: Config, num_blocks: int) -> Plan:
    return Plan(
        config.plan,
        num_blocks,
        parse_path_weights(config.weights),
        config.paths,
        config.include_last,
        get_schedule(config.probability),
        get_schedule(config.weights_schedule),
    )


def _make_objective(config: Config) -> Objective:
    return Objective(
        **{name: config[name] for name in (*WEIGHTS, 'temperature')},
        distillation_schedule=get_schedule(config.distillation_schedule),
    )


def find_network_layers(network: CutNetwork, image_shape: Sequence[int]) -> Layers:
    """Returns the layers of a network for images of shape (height, width, channels); nothing is computed."""
    variables: Any = jax.eval_shape(lambda: network.init(jax.random.key(0), image_shape))
    batch = jax.ShapeDtypeStruct((1, *image_shape), 'float32')

    def run(params, batch, batch_stats):
        return network.apply({'params': params, 'batch_stats': batch_stats}, batch, network.names, train=False)

    return find_layers(run, variables['params'], batch, variables['batch_stats'])


def blocks_of_layers(network: CutNetwork, variables: Any, image_shape: Sequence[int]) -> dict[str, str]:
    """Returns 'stem', 'block 1', ... or 'head' for the path of every layer; nothing is computed."""
    blocks: dict[str, str] = {}
    x = jax.ShapeDtypeStruct((1, *image_shape), 'float32')
    for number, names in enumerate((network.stem, *network.blocks, network.head)):
        label = {0: 'stem', len(network.blocks) + 1: 'head'}.get(number, f'block {number}')
        if names:

            def run(params, x, batch_stats, names=names):
                return network.apply({'params': params, 'batch_stats': batch_stats}, x, names, train=False)[0]

            arguments = (variables['params'], x, variables['batch_stats'])
            for path in find_layers(run, *arguments).quantizable:
                blocks.setdefault(path, label)
            x = jax.eval_shape(run, *arguments)
    return blocks
