"""Versions, settings of JAX and plugins that a run depends on, and the check that all processes share them."""

import hashlib
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

import bqat_jax
from bqat_jax.distributed.processes import check_agreement
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, leaves, plugin_files, to_plain
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.storage import Place, damaged

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets', 'grain', 'numpy')
# Settings of JAX that change results; their environment variables have these names in upper case.
NUMERICS = (
    'jax_enable_x64',
    'jax_default_prng_impl',
    'jax_default_matmul_precision',
    'jax_threefry_partitionable',
)
# Keys that may differ between the processes of a run: the process number and paths on its machine.
OF_ONE_PROCESS = (
    *('distributed', 'compilation_cache', 'plugins'),
    *('data.dir', 'data.workers', 'data.cache_dir', 'data.cache_gb'),
)
# Earlier versions named the training state differently.
FIRST_READABLE = (0, 3)


def versions() -> dict[str, str]:
    """Returns the versions of this program and of the packages that its results depend on."""
    return {
        'bqat_jax': bqat_jax.__version__,
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def numerics() -> dict[str, Any]:
    """Returns the settings of JAX by which numbers differ."""
    return {name: getattr(jax.config, name) for name in NUMERICS if hasattr(jax.config, name)}


def digests(files: Iterable[Place]) -> dict[str, str]:
    """Returns the SHA-256 of files, by their paths."""
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def describe_environment(experiment: Experiment) -> dict[str, Any]:
    """Returns versions, JAX's settings, plugins and devices of a run, as JSON."""
    return {
        'versions': versions(),
        'numerics': numerics(),
        'python': sys.version.split()[0],
        'plugins': digests(experiment.plugins),
        'data_set': dict(experiment.data.images.description),
        'platform': platform.platform(),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
        'devices': [device.device_kind for device in experiment.placement.mesh.devices.flat],
    }


def check_environment(recorded: Mapping[str, Any], workdir: Place, data_set: Mapping[str, Any]) -> None:
    """Checks that this program can resume a run with these settings of JAX and this data set.

    Args:
        recorded: the result of `describe_environment` when the workdir was made.
        workdir: for messages.
        data_set: the description of the data set.

    Raises:
        UserError: if an earlier version wrote checkpoints that this one cannot read, or a setting or the data set
            differs.
    """
    made_from = recorded.get('data_set', {})
    if made_from and data_set and made_from != data_set:
        raise UserError(
            f'{workdir} was made with another edition of the data set (there -> here): {made_from} -> '
            f'{dict(data_set)}. Use the folder of that edition (--config.data.dir=DIR), or another --workdir.'
        )
    version = str(recorded.get('versions', {}).get('bqat_jax', ''))
    numbers = tuple(int(part) for part in version.split('.')[:2] if part.isdigit())
    if numbers and numbers < FIRST_READABLE:
        own = bqat_jax.__version__
        raise UserError(
            f'{workdir} was made by bqat_jax {version}, and version {own} does not read its checkpoints. '
            'Use that version, or another --workdir.'
        )
    then, now = recorded.get('numerics', {}), numerics()
    if not isinstance(then, Mapping):
        raise damaged(workdir / 'environment.json', "its entry 'numerics' is not an object")
    changes = [f'{name}: {then[name]} -> {now[name]}' for name in now if name in then and then[name] != now[name]]
    if changes:
        raise UserError(
            f'{workdir} was made under other settings of JAX, and results depend on them (there -> now): '
            f'{"; ".join(changes)}. Set them as they were (as environment variables their names are in upper case), or '
            'use another --workdir.'
        )


def check_processes(config: Config, mode: str) -> None:
    """Checks that all processes of a run share one command and one program.

    Args:
        config: the resolved config.
        mode: the value of --mode.

    Raises:
        UserError: naming what differs, and in which process.
    """
    own = {name: to_plain(value) for name, value in leaves(config) if name not in OF_ONE_PROCESS}
    plugins = digests(file for file in plugin_files(config) if file.is_file())
    texts = {f'text of the plugin {Path(file).name}': digest[:12] for file, digest in plugins.items()}
    packages = {f'version of {name}': version for name, version in versions().items()}
    check_agreement({'--mode': mode, **own, **packages, **numerics(), **texts})


def check_memory(experiment: Experiment) -> None:
    """Checks that a device can hold its part of the parameters; training needs several times as much memory.

    Raises:
        UserError: if it cannot, or, for devices that do not report their memory, if the machine's memory is smaller.
    """
    devices = experiment.placement.mesh.local_devices
    leaves = jax.tree.leaves(experiment.shapes)
    own = sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    told = (devices[0].memory_stats() or {}).get('bytes_limit')
    limit = told or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    if own > limit:
        raise UserError(
            f'The network has {own / 1e9:.1f} GB of parameters on each device, and there are {limit / 1e9:.1f} GB of '
            'memory. Use a smaller network (config.network), or shard its arrays over more devices (mesh.fsdp).'
        )


def check_experiments(experiment: Experiment) -> None:
    """Checks that all processes have one network and data of one size.

    Raises:
        UserError: naming what differs, and in which process.
    """
    shapes = {
        f'shape of {jax.tree_util.keystr(path)}': [*leaf.shape, str(leaf.dtype)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(experiment.shapes)
    }
    images = experiment.data.images
    sizes = {f'examples of the {name} split': len(getattr(images, name)) for name in ('train', 'validation', 'test')}
    check_agreement({**shapes, **sizes, 'number of classes': images.num_classes, 'inputs': str(images.inputs)})
