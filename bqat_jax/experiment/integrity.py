"""Checks of checkpoints that were read: checksums, shapes, and which errors mean damage."""

import contextlib
import functools
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from bqat_jax.errors import UserError
from bqat_jax.storage import chain_of, is_refused

# TensorStore's status codes; `DAMAGE` has those of a missing, truncated or changed file.
STATUS = re.compile(
    r'\b(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|ABORTED|'
    r'RESOURCE_EXHAUSTED|FAILED_PRECONDITION|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS|'
    r'UNAUTHENTICATED): '
)
DAMAGE = {'NOT_FOUND', 'DATA_LOSS', 'INVALID_ARGUMENT', 'OUT_OF_RANGE', 'FAILED_PRECONDITION'}


def digest(tree: Any) -> jax.Array:
    """Returns a checksum of every array of a tree, uint32 (arrays,), on every device; any changed bit changes it.

    Orbax detects missing and truncated files, but not a flipped bit in an array. The checksum is the sum modulo 2^32 of
    the elements' bits, with the odd factor 2j + 1 for element j, counted from 0.
    """
    return _digest(tree, on_every_device(jax.tree.leaves(tree)[0].sharding))


def on_every_device(sharding: Any) -> Any:
    """Returns the replicated sharding on the devices of another sharding."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


@functools.partial(jax.jit, static_argnums=1)
def _digest(tree: Any, sharding: Any) -> jax.Array:
    def checksum(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        unsigned = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
        factors = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
        return jnp.sum(bits * factors, dtype=jnp.uint32)

    checksums = jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])
    return jax.lax.with_sharding_constraint(checksums, sharding)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences libraries about failed reads within the context: they print hundreds of lines for one file."""
    hook = sys.unraisablehook

    def ignore(unraisable):
        if 'Event loop is closed' not in str(unraisable.exc_value):
            hook(unraisable)

    absl_logger = logging.getLogger('absl')
    level = absl_logger.level
    sys.unraisablehook = ignore
    absl_logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = hook
        absl_logger.setLevel(level)


def arrays_of(tree: Any) -> dict[str, str]:
    """Returns the dtype and shape of every array of a tree, or of its metadata, as text by path."""
    arrays = {}
    tree = jax.tree.map(_key_data, tree, is_leaf=lambda node: hasattr(node, 'shape'))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, 'shape')):
        names = [str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))) for key in path]
        arrays['/'.join(names)] = f'{leaf.dtype}{list(leaf.shape)}'
    return arrays


def _key_data(leaf: Any) -> Any:
    """Random keys are saved as their key data."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def is_damage(error: BaseException) -> bool:
    """Returns whether an error of reading means that files are missing, truncated or changed.

    Other errors, such as those of a disk or a network that does not respond or denies access, do not mean damage.
    """
    parts = list(chain_of(error))
    if any(isinstance(part, UserError) or is_refused(str(part)) for part in parts):
        return False
    codes = {code for part in parts for code in STATUS.findall(str(part))}
    if codes:
        return codes <= DAMAGE
    of_files = FileNotFoundError | NotADirectoryError | IsADirectoryError
    if any(isinstance(part, OSError) and not isinstance(part, of_files) for part in parts):
        return False
    of_content = ValueError | LookupError | TypeError | AttributeError | AssertionError | EOFError
    return any(isinstance(part, of_files | of_content) for part in parts)
