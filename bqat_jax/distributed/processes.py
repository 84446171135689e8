"""Several processes, one or more per host, that train one network together.

Every process runs one program on its share of every batch. Only the first process writes files other than checkpoints.
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
# The most differences between processes that a message lists.
SHOWN = 10


def initialize(distributed: str) -> None:
    """Joins the other processes and starts the devices; call it before anything else of JAX.

    Args:
        distributed: 'off' for a single process; 'auto' if JAX can detect the others (Cloud TPU, Slurm, Open MPI,
            Kubernetes); 'HOST:PORT,n,i' for process i of n, with the address of process 0.

    Raises:
        UserError: for another value, or if the others cannot be reached or JAX cannot start its devices.
    """
    if distributed != OFF:
        _join(distributed)
    try:
        jax.devices()
    except Exception as error:  # JAX raises many kinds, such as RuntimeError and AssertionError
        why = str(error).partition('\n')[0] or 'there is none of that kind.'
        raise UserError(
            f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")!r}: JAX cannot start its devices here: {why} '
            'Unset it to use the available devices, or install JAX for the platform.'
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
    except Exception as error:  # network errors are of many kinds
        raise UserError(f'distributed={distributed!r}: {error}') from error


def is_first() -> bool:
    """Returns whether this is the first process, which writes for all."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Waits until every process has reached this point; `what` must be one text in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree(value: bool) -> bool:
    """Returns the first process's value in all processes; a check of the disk may differ between them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def total(value: int) -> int:
    """Returns the sum of a number over all processes."""
    return value if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(value)).sum())


def gather_bools(value: bool) -> list[bool]:
    """Returns the values of all processes, by process."""
    return [value] if jax.process_count() == 1 else multihost_utils.process_allgather(value).tolist()


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have equal facts; all must call it at the same point.

    Args:
        facts: values by name, as JSON.

    Raises:
        UserError: in all processes, naming facts that differ with their values by process.
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
    """Returns the bytes of all processes, by process."""
    lengths = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.frombuffer(own.ljust(int(lengths.max()), b' '), np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(everyone, lengths.tolist(), strict=True)]


def differences_between(facts: list[dict[str, Any]]) -> list[str]:
    """Returns the facts that differ between processes, such as 'name: 1 in processes 0, 2; 5 in process 1'."""
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
    """Puts this process's rows of a batch on the devices, sharded over the first axis."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
