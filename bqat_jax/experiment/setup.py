"""Turns a config into an `Experiment`; a config that cannot work is rejected before anything is computed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import rich.console
from flax import traverse_util

from bqat_jax.analysis.measurement import DiagnosisSettings
from bqat_jax.blocks.block_network import PARAMS, BlockNetwork
from bqat_jax.data.caching import ARRAYS, Cache
from bqat_jax.data.preprocessing import Augmentation
from bqat_jax.data.sources import ImageData, ImageOptions, load_images
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.distributed.sharding import FSDP_AXIS, Placement, Rule, make_mesh, parse_rules, rules_of_names
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import (
    Config,
    check_values,
    duration,
    local_files,
    plugin_files,
    section_of,
    to_plain,
)
from bqat_jax.experiment.environment import check_experiments
from bqat_jax.experiment.experiment import DataSpec, Experiment, InitSource, Intervals, PartnerSource, PhaseSpec
from bqat_jax.experiment.exploration import explore_network
from bqat_jax.networks.convolution import conv_general_dilated
from bqat_jax.registry import load_plugins, place_in_plugins
from bqat_jax.replacement.objective import WEIGHTS, Objective
from bqat_jax.replacement.plans import Plan, parse_path_weights
from bqat_jax.replacement.schedules import get_schedule
from bqat_jax.replacement.tasks import Task, get_task
from bqat_jax.storage import Hold, KeptArrays, Place, place
from bqat_jax.training.optimizer import OptimizerSpec, Rates
from bqat_jax.training.regularizers import Regularizers
from bqat_jax.training.strengths import TraceSettings
from bqat_jax.transform import Layers, check_unquantized, fit_settings
from bqat_jax.transform.rules import NO_QUANTIZER, LayerSettings, assign_quantizers

FULL_PRECISION_BITS = 32
# Values of init.quantizers.
KEEP, CALIBRATE = 'keep', 'calibrate'


def make_experiment(
    config: Config,
    workdir: Place,
    console: rich.console.Console,
    *,
    hold: Hold | None = None,
    images: ImageData | None = None,
    devices: Sequence[Any] | None = None,
) -> Experiment:
    """Returns the experiment that a config describes.

    Args:
        config: the resolved config.
        workdir: folder of all files that the run writes.
        console: where progress is shown.
        hold: exclusive write access to the workdir; one without a lease if None.
        images: the dataset; that of the config if None.
        devices: devices of the mesh; JAX's if None.

    Raises:
        UserError: naming the key, its value and what it may be.
    """
    check_values(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
    _check_batch(config, mesh.devices.size)
    plugins = plugin_files(config)
    load_plugins(local_files(plugins))  # a plugin may register the dataset
    images = images or _open_images(config, _ignored_label(config))
    data = _make_data_spec(config, images)
    epoch = len(images.train) / config.train.batch_size  # steps
    try:
        explored = explore_network(
            config.network.name,
            images.num_classes,
            config.replacement.cut,
            {key: value for key, value in config.network.items() if key != 'name'},
            conv_general_dilated if mesh.devices.size == 1 else None,
            images.inputs,
        )
        network, layers = explored.network, explored.layers
        rules = parse_rules(config.mesh.rules) + _rules_of_names(network, mesh.shape[FSDP_AXIS])
        placement = Placement(mesh, rules, config.mesh.min_shard_elements)
        quantizers = assign_quantizers(
            tuple(layers.quantizable),
            config.quant.weights.to_dict(),
            config.quant.activations.to_dict(),
            config.quant.rules,
        )
        quantizers = fit_settings(layers.quantizable, quantizers)
        if any(settings.weights is not None for settings in quantizers.values()):
            check_unquantized(layers, explored.unquantized_share, config.quant.allow_unquantized)
        regularizers = Regularizers(**config.quant.oscillations)
        _check_regularizers(regularizers, layers, quantizers)
        plan = _make_plan(config.replacement, len(network.blocks))
        objective = _make_objective(config.replacement, get_task(config.task))
        _check_task(objective.task, explored.outputs, images)
        objective.check_trains_network(plan.num_paths)
        experiment = Experiment(
            config=to_plain(config),
            method=_describe_method(config),
            workdir=workdir,
            hold=hold or Hold(),
            console=console,
            plugins=plugins,
            seeds=range(config.seed, config.seed + config.train.replicas),
            placement=placement,
            data=data,
            network=network,
            shapes=Replicas(1, placement).stacked_shapes(explored.shapes),
            layers=layers,
            quantizers=quantizers,
            plan=plan,
            objective=objective,
            regularizers=regularizers,
            draw_seed=config.replacement.seed,
            microbatches=config.train.microbatches,
            batch_norm_groups=config.train.batch_norm_groups,
            calibration_batches=config.quant.calibration_batches,
            reestimation_batches=config.quant.reestimation_batches,
            partner=PhaseSpec(duration(config, 'partner.', epoch), _make_optimizer(config, 'partner.optimizer', epoch)),
            partner_source=_make_partner_source(config),
            init=_make_init_source(config),
            training=PhaseSpec(duration(config, 'train.', epoch), _make_optimizer(config, 'optimizer', epoch)),
            intervals=_make_intervals(config, epoch),
            kept_checkpoints=config.checkpoint.keep,
            trace=TraceSettings(
                config.quant.trace.batches, config.quant.trace.iterations, config.quant.trace.tolerance
            ),
            diagnosis=DiagnosisSettings(
                config.diagnosis.batches, config.diagnosis.samples, config.diagnosis.oscillation_steps
            ),
        )
    except ValueError as error:  # the library's messages name values of the config
        raise UserError(str(error)) from error
    except Exception as error:
        where = place_in_plugins(error)
        if where is None:
            raise
        raise UserError(f'{where} raised {type(error).__name__}: {error}') from error
    check_experiments(experiment)
    return experiment


def _rules_of_names(network: BlockNetwork, parts: int) -> tuple[Rule, ...]:
    """Sharding rules for parameters whose axes the module names; none without sharding."""
    if parts == 1:
        return ()
    boxed: Any = jax.eval_shape(network.init_boxed, jax.random.key(0))
    names: Any = traverse_util.flatten_dict(nn.get_partition_spec(boxed[PARAMS]), sep='/')
    shapes: Any = traverse_util.flatten_dict(nn.meta.unbox(boxed[PARAMS]), sep='/')
    return rules_of_names(names, shapes, parts)


def _check_batch(config: Config, devices: int) -> None:
    """Checks that batches and replicas can be split over the devices."""
    train = config.train
    if train.batch_size % (devices * train.microbatches):
        parts = f' in train.microbatches={train.microbatches} parts' if train.microbatches > 1 else ''
        raise UserError(
            f'train.batch_size={train.batch_size} cannot be split over {devices} devices{parts}. '
            'Use a multiple, or fewer devices (mesh.data).'
        )
    if train.batch_size // train.microbatches % train.batch_norm_groups:
        raise UserError(
            f'train.batch_norm_groups={train.batch_norm_groups} does not divide the '
            f'{train.batch_size // train.microbatches} images that are run at once.'
        )
    if train.replicas == 1:
        return
    if train.replicas % devices:
        raise UserError(
            f'train.replicas={train.replicas} cannot be split over {devices} devices. Use a '
            'multiple, or fewer devices (mesh.data).'
        )
    if config.mesh.fsdp > 1 or jax.process_count() > 1:
        raise UserError(
            f'train.replicas={train.replicas} needs each seed on one device of one process: '
            'mesh.fsdp must be 1 and distributed off. Or train the seeds one after another.'
        )


def _ignored_label(config: Config) -> int | None:
    """The label that the task ignores."""
    try:
        return getattr(get_task(config.task), 'ignore', None)
    except ValueError as error:
        raise UserError(str(error)) from error


def _open_images(config: Config, ignore: int | None) -> ImageData:
    data = config.data
    if data.on_device and data.skip_damaged:
        raise UserError(
            'data.skip_damaged=True, data.on_device=True: complete splits are read onto the device. Use '
            '--config.data.on_device=false.'
        )
    if data.on_device and data.image_size is not None:
        raise UserError(
            f'data.image_size={data.image_size}, data.on_device=True: images are cropped on the host. Use '
            '--config.data.on_device=false.'
        )
    options = ImageOptions(
        validation_fraction=data.validation_fraction,
        image_size=data.image_size,
        train_split=data.train_split,
        test_split=data.test_split,
        validation_split=data.validation_split,
        train_examples=data.train_examples,
        value_range=data.value_range,
        ignore=ignore,
        cache=_make_cache(data),
    )
    return load_images(data.name, None if data.dir is None else str(place(data.dir, 'data.dir')), options)


def _make_cache(data: Config) -> Cache:
    """The cache of data sets in buckets; without data.cache_dir only those that cannot be read directly are cached."""
    if data.cache_dir is None:
        return Cache(most_bytes=data.cache_gb * 1e9, is_wished=False)
    directory = place(data.cache_dir, 'data.cache_dir')
    if not isinstance(directory, Path):
        raise UserError(f'data.cache_dir={data.cache_dir!r}: it must be a local folder.')
    return Cache(directory, data.cache_gb * 1e9)


def _make_kept(config: Config) -> KeptArrays | None:
    """The cache of arrays: in `data.cache_dir`, else beside compiled programs; None if neither is set."""
    if config.data.cache_dir is not None:
        return _make_cache(config.data).arrays
    folder = None if config.compilation_cache is None else place(config.compilation_cache, 'compilation_cache')
    return KeptArrays(folder / ARRAYS, config.data.cache_gb * 1e9) if isinstance(folder, Path) else None


def _make_data_spec(config: Config, images: ImageData) -> DataSpec:
    data, channels = config.data, images.image_shape[-1]
    _check_augmentation(config, images)
    if not images.is_tokens and (len(data.mean) != channels or len(data.std) != channels):
        raise UserError(
            f'data.mean={data.mean}, data.std={data.std}: the images have {channels} channels. Use one number for each.'
        )
    return DataSpec(
        images=images,
        batch_size=config.train.batch_size,
        on_device=data.on_device,
        workers=data.workers,
        skips_damaged=data.skip_damaged,
        mean=tuple(data.mean),
        std=tuple(data.std),
        augmentation=Augmentation(data.crop_padding, data.flip, data.color_jitter),
        kept=_make_kept(config),
    )


def _check_augmentation(config: Config, images: ImageData) -> None:
    """Checks that the augmentation suits the examples."""
    keys = ['crop_padding', 'flip', 'color_jitter'] if images.is_tokens else ['crop_padding', 'flip']
    given = [f'data.{key}={config.data[key]}' for key in keys if config.data[key]]
    if given and (images.is_tokens or images.label_shape):
        what = (
            'examples are sequences of tokens' if images.is_tokens else 'every pixel has a label, which would not move'
        )
        raise UserError(f'{", ".join(given)}: in data.name={config.data.name!r} {what}. Leave it out.')


def _check_regularizers(regularizers: Regularizers, layers: Layers, quantizers: dict[str, LayerSettings]) -> None:
    for path, settings in quantizers.items():
        if settings.weights is not None:
            quantizer = settings.weights.make(of_weights=True, signed=True)
            regularizers.check(path, quantizer, layers.quantizable[path])


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


def _make_objective(config: Config, task: Task) -> Objective:
    return Objective(
        **{name: config[name] for name in (*WEIGHTS, 'temperature')},
        distillation_schedule=get_schedule(config.distillation_schedule),
        task=task,
    )


def _check_task(task: Task, outputs: Any, images: ImageData) -> None:
    """Checks that the shapes of the network's outputs and of the labels fit the task."""
    shape = images.image_shape if images.is_tokens else images.label_shape
    labels = jax.ShapeDtypeStruct((1, *shape), 'int32')
    task.check(outputs, labels, images.num_classes)


def _make_optimizer(config: Config, name: str, epoch: float) -> OptimizerSpec:
    section, _ = section_of(config, f'{name}.name')
    own = section.get('quantizers')
    return OptimizerSpec(
        name=section.name,
        learning_rate=section.learning_rate,
        momentum=section.momentum,
        beta2=section.beta2,
        nesterov=section.nesterov,
        weight_decay=section.weight_decay,
        warmup_steps=duration(config, f'{name}.warmup_', epoch),
        clip_norm=section.clip_norm,
        quantizers=None if own is None else Rates(own.learning_rate, own.weight_decay),
    )


def _make_partner_source(config: Config) -> PartnerSource:
    partner = config.partner
    if partner.workdir and partner.torch_file:
        raise UserError('partner.workdir and partner.torch_file are both set. A run has one partner: set one of them.')
    file = None if partner.torch_file is None else str(place(partner.torch_file, 'partner.torch_file'))
    workdir = None if partner.workdir is None else place(partner.workdir, 'partner.workdir')
    if file is None and workdir is None and config.init.workdir is not None:
        workdir = place(config.init.workdir, 'init.workdir')  # the network keeps the partner that it had
    if (partner.torch_key or partner.new_head) and file is None:
        raise UserError(
            f'partner.torch_key={partner.torch_key!r}, partner.new_head={partner.new_head}: they need a PyTorch file. '
            'Set partner.torch_file, or leave them out.'
        )
    options = {key: value for key, value in config.network.items() if key != 'name'}
    return PartnerSource(config.network.name, file, workdir, partner.torch_key or None, partner.new_head, options)


def _make_init_source(config: Config) -> InitSource:
    init = config.init
    if init.quantizers not in (KEEP, CALIBRATE):
        raise UserError(f'init.quantizers={init.quantizers!r}: it must be {CALIBRATE!r} or {KEEP!r}.')
    if init.workdir is None and init.quantizers == KEEP:
        raise UserError(f'init.quantizers={KEEP!r}: set the run that has them (--config.init.workdir=DIR).')
    return InitSource(None if init.workdir is None else place(init.workdir, 'init.workdir'), init.quantizers == KEEP)


def _make_intervals(config: Config, epoch: float) -> Intervals:
    return Intervals(
        log=config.train.log_every_steps,
        save=max(1, duration(config, 'checkpoint.every_', epoch)),
        measure=max(1, duration(config, 'quant.trace.every_', epoch)),
        diagnose=config.diagnosis.every_steps or 0,
        traced=tuple(config.profile_steps) if config.profile else (0, 0),
    )


def _describe_method(config: Config) -> dict[str, Any]:
    """The entries of `result.json` that come from the config."""

    def bits(role):
        return FULL_PRECISION_BITS if config.quant[role].name == NO_QUANTIZER else config.quant[role].bits

    return {
        'weight_bits': bits('weights'),
        'activation_bits': bits('activations'),
        'weight_quantizer': config.quant.weights.name,
        'weight_estimator': config.quant.weights.estimator,
        'activation_quantizer': config.quant.activations.name,
        'activation_estimator': config.quant.activations.estimator,
        'plan': config.replacement.plan,
        'distillation': config.replacement.distillation,
        'seed': config.seed,
    }
