"""Several processes, one or more for each host, that train one network together.

Each runs the same program on its own share of every batch. The first process alone writes what is not a checkpoint.
"""

import logging
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from bqat_jax.errors import UserError

logger = logging.getLogger(__name__)

OFF, AUTO = 'off', 'auto'


def initialize(distributed: str) -> None:
    """Joins the other processes; to be called before anything else of JAX.

    Args:
        distributed: 'off' for a process that is alone; 'auto' where JAX can find out by itself (Cloud TPU, Slurm, Open
            MPI, Kubernetes); 'HOST:PORT,n,i' for process i of n, with the address of process 0.

    Raises:
        UserError: for anything else, or if the others cannot be reached.
    """
    if distributed == OFF:
        return
    arguments: dict[str, Any] = {}
    if distributed != AUTO:
        try:
            address, count, number = distributed.split(',')
            arguments = {'coordinator_address': address, 'num_processes': int(count), 'process_id': int(number)}
            if ':' not in address or not 0 <= int(number) < int(count):
                raise ValueError(distributed)
        except ValueError as error:
            raise UserError(
                f"distributed={distributed!r}: it must be 'off', 'auto', or HOST:PORT,n,i for process i of n, counted "
                'from 0, with the address of process 0.'
            ) from error
    try:
        jax.distributed.initialize(**arguments)
    except Exception as error:  # whatever went wrong in the network
        raise UserError(f'distributed={distributed!r}: {error}') from error


def is_first() -> bool:
    """Returns whether this process writes for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has come here; `what` is the same text in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree(value: bool) -> bool:
    """Returns what the first process says, in all of them: what is on disk may look different a moment later."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def total(value: int) -> int:
    """Returns the sum of a number over all processes, in all of them."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(value)).sum())


def gather_bools(value: bool) -> list[bool]:
    """Returns what every process says, in all of them."""
    return [value] if jax.process_count() == 1 else multihost_utils.process_allgather(value).tolist()


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Returns a batch on the devices, split over its first axis, from this process's rows of it."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
