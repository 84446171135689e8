"""Several processes, one or more for each host, that train one network together.

Each runs the same program on its own share of every batch. The first process alone writes what is not a checkpoint.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from bqat_jax.errors import UserError

logger = logging.getLogger(__name__)

OFF, AUTO = 'off', 'auto'
LARGEST_PORT = 65535
# Differences between processes that a message shows.
SHOWN = 10


def initialize(distributed: str) -> None:
    """Joins the other processes and starts the devices; to be called before anything else of JAX.

    Args:
        distributed: 'off' for a process that is alone; 'auto' where JAX can find out by itself (Cloud TPU, Slurm, Open
            MPI, Kubernetes); 'HOST:PORT,n,i' for process i of n, with the address of process 0.

    Raises:
        UserError: for anything else, or if the others cannot be reached or JAX cannot start its devices.
    """
    if distributed != OFF:
        _join(distributed)
    try:
        jax.devices()
    except Exception as error:  # of many kinds: RuntimeError, AssertionError
        why = str(error).partition('\n')[0] or 'there is none of that kind.'
        raise UserError(
            f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")!r}: JAX cannot start its devices here: {why} '
            'Unset it to take what there is, or install JAX for the platform.'
        ) from error


def _join(distributed: str) -> None:
    arguments: dict[str, Any] = {}
    if distributed != AUTO:
        try:
            address, count, number = distributed.split(',')
            arguments = {'coordinator_address': address, 'num_processes': int(count), 'process_id': int(number)}
            host, _, port = address.rpartition(':')
            if not host or not 1 <= int(port) <= LARGEST_PORT or not 0 <= int(number) < int(count):
                raise ValueError(distributed)
        except ValueError as error:
            raise UserError(
                f"distributed={distributed!r}: it must be 'off', 'auto', or HOST:PORT,n,i for process i of n, counted "
                'from 0, with the address of process 0, whose port is 1 to 65535.'
            ) from error
    logger.info('Waiting for the other processes (distributed=%s).', distributed)
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


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts; every process must call it at the same point.

    Args:
        facts: values by name, as JSON.

    Raises:
        UserError: in all processes, if they differ; it names what, and the values by process.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    everyone = multihost_utils.process_allgather(digest)
    if np.all(everyone == everyone[0]):
        return
    texts = _gather_bytes(text)
    differences = differences_between([json.loads(one) for one in texts])
    listed = '\n  '.join(differences[:SHOWN])
    more = f'\n  and {len(differences) - SHOWN} more' if len(differences) > SHOWN else ''
    raise UserError(
        f'The processes of this run do not agree:\n  {listed}{more}\n'
        'Start all of them with the same command, the same files and the same packages.'
    )


def _gather_bytes(own: bytes) -> list[bytes]:
    """What every process gives, in all of them."""
    lengths = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.frombuffer(own.ljust(int(lengths.max()), b' '), np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(everyone, lengths.tolist(), strict=True)]


def differences_between(facts: list[dict[str, Any]]) -> list[str]:
    """Returns the facts that differ between processes, each as 'name: 1 in processes 0, 2; 5 in process 1'."""
    listed = []
    for name in sorted(set[str]().union(*facts)):
        by_value: dict[str, list[str]] = {}
        for number, own in enumerate(facts):
            by_value.setdefault(json.dumps(own[name]) if name in own else 'absent', []).append(str(number))
        if len(by_value) > 1:
            values = [
                f'{value} in process{"es" if len(numbers) > 1 else ""} {", ".join(numbers)}'
                for value, numbers in by_value.items()
            ]
            listed.append(f'{name}: {"; ".join(values)}')
    return listed


def put_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Returns a batch on the devices, split over its first axis, from this process's rows of it."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
