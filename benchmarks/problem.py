"""The training step of a recipe without its dataset: images and labels at random, or shapes alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from bqat_jax.data.augmentation import normalize
from bqat_jax.data.sources import ImageData, Subset
from bqat_jax.distributed.sharding import over_batch
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.experiment import Setting, make_setting
from bqat_jax.experiment.loop import Phase, state_target
from bqat_jax.experiment.low_precision import make_phase, quantizer_shapes
from bqat_jax.experiment.partner import Partner
from bqat_jax.training.optimizer import NETWORK, QUANTIZERS, make_optimizer
from bqat_jax.training.step import init_state, make_train_step
from bqat_jax.transform import calibrate

# Training images, classes and shape of datasets that are not read.
SIZES = {
    'imagenet2012': (1_281_167, 1000, (224, 224, 3)),
    'cifar10': (50_000, 10, (32, 32, 3)),
    'cifar100': (50_000, 100, (32, 32, 3)),
    'digits': (1_437, 10, (8, 8, 1)),
}


class Bench(NamedTuple):
    """A step and what it is called with.

    Attributes:
        setting: of the recipe.
        phase: of the low-precision network.
        step: jitted `step(state, partner, None, batch) -> state, metrics`; it takes the state over.
        state: arrays, or their shapes.
        partner: the partner's variables, or None if the step does not read them.
        batch: images and labels.
    """

    setting: Setting
    phase: Phase
    step: Any
    state: Any
    partner: Any
    batch: Any


def described_images(name: str) -> ImageData:
    """Returns a dataset of which only sizes are known.

    Raises:
        UserError: for a dataset whose sizes are not known here.
    """
    if name not in SIZES:
        raise UserError(f'data.name={name!r}: the sizes are known here of {", ".join(SIZES)}.')
    count, num_classes, shape = SIZES[name]
    nothing = Subset(None, np.arange(0))
    return ImageData(Subset(None, np.arange(count)), nothing, nothing, num_classes, shape)


def make_bench(config: Config, devices: Sequence[Any] | None = None, *, with_arrays: bool) -> Bench:
    """Returns the training step of a config.

    Args:
        config: a recipe's, changed as it is to be measured. The inputs of all layers but the stem's are taken for
            unsigned, where a run looks at data.
        devices: those of the mesh; JAX's if None.
        with_arrays: whether to make arrays, or shapes alone.

    Raises:
        UserError: for a config that cannot work.
    """
    images = described_images(config.data.name)
    config = config.copy_and_resolve_references()
    config.data.on_device = False
    setting = make_setting(config, Path('nowhere'), rich.console.Console(quiet=True), images=images, devices=devices)
    facts = {'mean': config.data.mean, 'std': config.data.std}
    signed = {path: path.startswith('stem') for path in setting.found.quantizable}
    variables = setting.abstract_variables
    if with_arrays:
        make = jax.jit(
            lambda key: setting.network.init(key, images.image_shape),
            out_shardings=setting.single.placement.shardings(variables),
        )
        variables = make(jax.random.key(0))
    phase = make_phase(setting, Partner(variables, facts), signed)
    optimizer, learning_rate = make_optimizer(phase.optimizer, phase.steps, setting.steps(phase.optimizer, 'warmup_'))
    step = make_train_step(phase.problem, optimizer, learning_rate, phase.replicas)
    partner = variables if phase.problem.replacement.needs_partner else None
    sharding, replicas = over_batch(setting.mesh), phase.replicas
    axes = (config.train.batch_size,) if replicas.count == 1 else (replicas.count, config.train.batch_size)
    if not with_arrays:
        state = state_target(setting, phase, quantizer_shapes(setting, phase.problem.replacement.quantization))
        batch = {
            'image': jax.ShapeDtypeStruct((*axes, *images.image_shape), 'uint8', sharding=sharding),
            'label': jax.ShapeDtypeStruct(axes, 'int32', sharding=sharding),
        }
        return Bench(setting, phase, step, state, partner, batch)
    generator = np.random.default_rng(0)
    batch = {
        'image': generator.integers(0, 256, (*axes, *images.image_shape)).astype(np.uint8),
        'label': generator.integers(0, images.num_classes, axes).astype(np.int32),
    }
    sample = normalize(jnp.asarray(batch['image'].reshape(-1, *images.image_shape)[:64]), *facts.values())

    def run(params, x):
        return setting.network.apply({**variables, 'params': params}, x, setting.network.names, train=True)

    quantizers = calibrate(phase.problem.replacement.quantization, variables['params'], run, [sample])

    def init(params, batch_stats, key):
        params, batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))  # the step takes its state over
        return init_state(phase.problem, key, params, batch_stats, optimizer)

    params = {NETWORK: variables['params'], QUANTIZERS: quantizers}
    arguments = [(params, variables['batch_stats'], jax.random.key(number)) for number in range(replicas.count)]
    state = replicas.jit(replicas.over(init, (0, 0, 0)), (0, 0, 0))(*replicas.stack(arguments))
    return Bench(setting, phase, step, state, partner, jax.device_put(batch, sharding))


def peak_bytes(compiled: Any) -> int:
    """Returns the memory that a compiled program needs at most on one device, by XLA's account."""
    memory = compiled.memory_analysis()
    # What is donated is in the arguments and the outputs, and lies there once.
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arrays + memory.temp_size_in_bytes
