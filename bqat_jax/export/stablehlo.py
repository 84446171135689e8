"""A frozen network as a StableHLO program, which runs with JAX and without this project."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.export.frozen import Frozen
from bqat_jax.export.inference import FLOAT32, Program, packed_arrays_of, unpack_arrays

PLATFORMS = ('cpu', 'cuda', 'tpu')
SUFFIX = '.stablehlo'
BATCH_AXIS = 'batch'


def export_stablehlo(
    frozen: Frozen, network: BlockNetwork, *, batch: int = 0, arithmetic: str = FLOAT32, with_codes: bool = False
) -> bytes:
    """Returns the serialized program, for `jax.export.deserialize(content).call(inputs)`.

    It holds packed codes and runs on CPUs, NVIDIA GPUs and TPUs. It names no source files, so its bytes do not depend
    on the folders of this machine.

    Args:
        frozen: the network as arrays.
        network: the `BlockNetwork` that was frozen.
        batch: the batch size; 0 for any, which this version of JAX or a newer one can read.
        arithmetic: see `logits_function`.
        with_codes: whether it returns (outputs, {layer path: codes of its input at each call}), to compare networks.

    Raises:
        ValueError: if the network cannot be traced for a symbolic batch size.
    """
    program = Program(frozen, network, arithmetic)
    run = program.run_with_codes if with_codes else program.run

    def logits(inputs):
        # The barrier keeps XLA from unpacking the codes at compile time, which is slow.
        arrays = packed_arrays_of(frozen)
        codes = jax.lax.optimization_barrier({path: jnp.asarray(x) for path, x in arrays['codes'].items()})
        return run(unpack_arrays(frozen, {**arrays, 'codes': codes}), inputs)

    exported = jax.export.export(jax.jit(logits), platforms=PLATFORMS)
    try:
        with _without_source_files():
            return bytes(exported(batch_of(frozen, batch)).serialize())
    except Exception as error:
        if batch:
            raise
        what = f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
        raise ValueError(
            f'The network cannot be traced for any number of examples ({what}). Export it for a fixed number '
            '(batch=1; --config.export.batch=1).'
        ) from error


def batch_of(frozen: Frozen, batch: int) -> Any:
    """Returns shapes and dtypes of a batch of inputs; its size is symbolic if `batch` is 0."""
    size = batch or jax.export.symbolic_shape(BATCH_AXIS)[0]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), frozen.inputs)


@contextlib.contextmanager
def _without_source_files() -> Iterator[None]:
    """Leaves the Python frames of every operation, which name files of this machine, out of lowered programs."""
    key = 'jax_traceback_in_locations_limit'
    before = getattr(jax.config, key)
    jax.config.update(key, 0)
    try:
        yield
    finally:
        jax.config.update(key, before)
