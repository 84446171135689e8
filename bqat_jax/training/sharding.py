"""The mesh of devices and what lies where on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bqat_jax.errors import UserError

DATA_AXIS = 'data'


def make_mesh(data: int) -> Mesh:
    """Returns a mesh with one axis, 'data', over the first `data` devices; -1 for all.

    Raises:
        UserError: if there are not so many devices.
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise UserError(f'mesh.data={data}: there are {len(devices)} devices; give 1 to {len(devices)}, or -1 for all.')
    return Mesh(np.array(devices[:count]), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))
