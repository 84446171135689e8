"""The training step of a recipe without its dataset, on random examples or on shapes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.data.sources import ImageData, Subset
from bqat_jax.distributed.sharding import over_batch
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.low_precision import low_precision_phase
from bqat_jax.experiment.partner import Partner, make_preprocessing
from bqat_jax.experiment.phase import Phase
from bqat_jax.experiment.run_phase import initial_state
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.replacement.paths import Variables
from bqat_jax.training.optimizer import make_optimizer
from bqat_jax.training.step import make_train_step
from bqat_jax.transform import build_quantization, prepare_layers

# Sizes of datasets that are not read.
DESCRIBED = {
    'imagenet2012': {'examples': 1_281_167, 'num_classes': 1000, 'image_shape': (224, 224, 3)},
    'cifar10': {'examples': 50_000, 'num_classes': 10, 'image_shape': (32, 32, 3)},
    'cifar100': {'examples': 50_000, 'num_classes': 100, 'image_shape': (32, 32, 3)},
    'digits': {'examples': 1_437, 'num_classes': 10, 'image_shape': (8, 8, 1)},
    'digits_segmentation': {
        'examples': 3_600,
        'num_classes': 11,
        'image_shape': (16, 16, 1),
        'label_shape': (16, 16),
    },
    # The number of sequences for Python 3.11.
    'python_bytes': {'examples': 138_228, 'num_classes': 256, 'image_shape': (64,), 'is_tokens': True},
}


class Bench(NamedTuple):
    """A training step and its arguments.

    Attributes:
        experiment: the recipe's experiment.
        phase: the phase of the low-precision network.
        step: jitted `step(state, partner, None, batch) -> state, metrics`; it donates `state`.
        state: arrays, or their shapes.
        partner: the partner's variables, or None if the step does not read them.
        batch: a batch of stored examples.
    """

    experiment: Experiment
    phase: Phase
    step: Any
    state: Any
    partner: Any
    batch: Any


def described_images(name: str) -> ImageData:
    """Returns a dataset with sizes and no examples.

    Raises:
        UserError: for a dataset that is not in `DESCRIBED`.
    """
    if name not in DESCRIBED:
        raise UserError(f'data.name={name!r}: must be one of {", ".join(DESCRIBED)}.')
    described = dict(DESCRIBED[name])
    count, nothing = described.pop('examples'), Subset(None, np.arange(0))
    return ImageData(Subset(None, np.arange(count)), nothing, nothing, **described)


def make_bench(config: Config, devices: Sequence[Any] | None = None, *, with_arrays: bool) -> Bench:
    """Returns the training step of a config.

    Args:
        config: the config to measure.
        devices: devices of the mesh; JAX's if None.
        with_arrays: whether to make arrays or only shapes. With shapes, inputs of all layers but the stem's are assumed
            to be unsigned.

    Raises:
        UserError: for a config that cannot work.
    """
    images = described_images(config.data.name)
    config = config.copy_and_resolve_references()
    config.data.on_device = False
    console = rich.console.Console(quiet=True)
    experiment = make_experiment(config, Path('nowhere'), console, images=images, devices=devices)
    facts = {'mean': config.data.mean, 'std': config.data.std}
    layers, settings = experiment.layers.quantizable, experiment.quantizers
    sharding, replicas = over_batch(experiment.placement.mesh), experiment.replicas
    axes = (config.train.batch_size,) if replicas.count == 1 else (replicas.count, config.train.batch_size)
    arrays = _arrays_of(images)
    if not with_arrays:
        quantization = build_quantization(layers, settings, {path: path.startswith('stem') for path in layers})
        phase = low_precision_phase(experiment, Partner(experiment.shapes, facts), quantization)
        batch = {
            name: jax.ShapeDtypeStruct(axes + shape, dtype, sharding=sharding)
            for name, (shape, dtype, _) in arrays.items()
        }
        return _make_bench(experiment, phase, phase.state_shapes, batch)
    generator = np.random.default_rng(0)
    batch = {
        name: generator.integers(0, count, axes + shape).astype(dtype) for name, (shape, dtype, count) in arrays.items()
    }
    make = jax.jit(
        lambda key: experiment.network.init(key, images.inputs),
        out_shardings=experiment.placement.shardings(experiment.shapes),
    )
    variables = make(jax.random.key(0))
    some = {name: jnp.asarray(x.reshape(-1, *arrays[name][0])[:64]) for name, x in batch.items()}
    sample = make_preprocessing(experiment, facts)(some, None, None).inputs
    run = experiment.network.as_function(variables, train=True)
    quantization, quantizers = prepare_layers(run, variables['params'], [sample], layers, settings)
    phase = low_precision_phase(experiment, Partner(variables, facts), quantization)
    start = Variables(variables['params'], quantizers, other_collections(variables))
    state = initial_state(experiment, phase, lambda _: start)
    return _make_bench(experiment, phase, state, jax.device_put(batch, sharding))


def _arrays_of(images: ImageData) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Returns shape, dtype and number of values of the arrays of an example, by name."""
    if images.is_tokens:
        return {'tokens': ((images.image_shape[0] + 1,), 'uint8', images.num_classes)}
    return {
        'image': (images.image_shape, images.dtype, 256),
        'label': (images.label_shape, 'int32', images.num_classes),
    }


def _make_bench(experiment: Experiment, phase: Phase, state: Any, batch: Any) -> Bench:
    optimizer, learning_rate = make_optimizer(phase.optimizer, phase.spec.steps)
    step = make_train_step(phase.spec, optimizer, learning_rate, phase.replicas)
    partner = phase.partner if phase.spec.replacement.needs_partner else None
    return Bench(experiment, phase, step, state, partner, batch)


def peak_bytes(compiled: Any) -> int:
    """Returns the peak memory of a compiled program on one device, from XLA's analysis."""
    memory = compiled.memory_analysis()
    # Donated arrays are both arguments and outputs, and need memory once.
    arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arrays + memory.temp_size_in_bytes
