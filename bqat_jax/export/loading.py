"""Opens an exported file of any format as a function."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.export import checkpoint, stablehlo
from bqat_jax.export.frozen import Frozen
from bqat_jax.export.inference import FLOAT32, logits_function
from bqat_jax.networks import make_network

ONNX_SUFFIX = '.onnx'


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported network, as a function from a batch of inputs to outputs.

    Attributes:
        run: from inputs to outputs, trees of arrays.
        inputs: shapes and dtypes of one example, a tree of `jax.ShapeDtypeStruct`.
        batch: the batch size; None for any.
    """

    run: Callable[[Any], Any] = dataclasses.field(repr=False)
    inputs: Any
    batch: int | None = None

    def __call__(self, inputs: Any) -> Any:
        """Returns the outputs for a batch.

        Raises:
            ValueError: for inputs of another shape or dtype.
        """
        inputs = jax.tree.map(lambda x: x if hasattr(x, 'dtype') else np.asarray(x), inputs)
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
        if given != self.inputs:
            raise ValueError(f'The network takes a batch of {self.inputs}, and these are {given}.')
        sizes = {np.shape(x)[0] for x in jax.tree.leaves(inputs)}
        if self.batch is not None and sizes != {self.batch}:
            raise ValueError(f'The network takes {self.batch} examples at once, and these are {sorted(sizes)}.')
        return self.run(inputs)


def load(path: str | os.PathLike, network: BlockNetwork | None = None, arithmetic: str = FLOAT32) -> Exported:
    """Opens an exported network as a function, without a config or a workdir.

    Args:
        path: a file with the suffix `.safetensors`, `.stablehlo` or `.onnx`.
        network: for a packed file of your own module: the `BlockNetwork` that was exported, such as the result of
            `bq.split_after(module, ends, inputs)`.
        arithmetic: for a packed file: 'float32' or 'int8', see `logits_function`.

    Returns:
        A function from a batch of inputs to outputs: JAX arrays, or NumPy arrays for ONNX.

    Raises:
        ValueError: for a file of another kind, a damaged file, or a network with other parameters.
        TypeError: if `network` is not a `BlockNetwork`.
        FileNotFoundError: if the file does not exist.
        ImportError: if a package that the format needs is missing.
    """
    path = Path(path)
    if not path.is_file():
        what = ': it is a folder' if path.is_dir() else ''
        raise FileNotFoundError(f'There is no file {path}{what}.')
    if path.suffix != checkpoint.SUFFIX and (network is not None or arithmetic != FLOAT32):
        raise ValueError(f'{path}: network and arithmetic are for packed files ({checkpoint.SUFFIX}) only.')
    if path.suffix == checkpoint.SUFFIX:
        frozen = checkpoint.read_checkpoint(path)
        network = build_network(frozen) if network is None else network
        return Exported(logits_function(frozen, network, arithmetic), frozen.inputs)
    if path.suffix == stablehlo.SUFFIX:
        return _load_stablehlo(path)
    if path.suffix == ONNX_SUFFIX:
        return _load_onnx(path)
    kinds = ', '.join((checkpoint.SUFFIX, stablehlo.SUFFIX, ONNX_SUFFIX))
    raise ValueError(f'{path}: exported networks have one of the suffixes {kinds}.')


def build_network(frozen: Frozen) -> BlockNetwork:
    """Rebuilds the network that a packed file describes.

    Raises:
        ValueError: if it is a user's module, or not registered.
    """
    facts: Mapping[str, Any] | None = frozen.network
    if facts is None:
        raise ValueError(
            'The file holds the arrays of a module of your own. Pass its BlockNetwork, load(path, network=...), as '
            'returned by bq.split_after(module, ends, inputs).'
        )
    try:
        network = make_network(facts['name'], facts['num_classes'], facts['cut'], facts['options'])
    except (KeyError, TypeError) as error:
        raise ValueError(f'The file is damaged: its network is {facts!r}.') from error
    inputs = frozen.inputs
    if frozen.normalization is not None:
        inputs = jax.ShapeDtypeStruct(inputs.shape, jnp.float32)
    return with_inputs(network, inputs)


def _load_stablehlo(path: Path) -> Exported:
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
    except Exception as error:
        raise ValueError(
            f'{path} is damaged, or not a program that JAX {jax.__version__} can read ({type(error).__name__}): it '
            'reads those of its own version and of older ones.'
        ) from error
    given, named = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    if len(given) != 1 or named or not all(x.shape for x in exported.in_avals) or not exported.in_avals:
        raise ValueError(f'{path} is a program with arguments other than one batch of inputs.')
    (arguments,) = given
    batch = jax.tree.leaves(arguments)[0].shape[0]
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), arguments)
    return Exported(jax.jit(exported.call), inputs, batch if isinstance(batch, int) else None)


def _load_onnx(path: Path) -> Exported:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('ONNX files run in onnxruntime: pip install onnxruntime.') from error
    try:
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    except Exception as error:
        raise ValueError(f'{path} is not a model that onnxruntime runs: {error}') from error
    arguments, outputs = session.get_inputs(), [x.name for x in session.get_outputs()]
    if len(arguments) != 1 or len(outputs) != 1:
        raise ValueError(f'{path} has {len(arguments)} inputs and {len(outputs)} outputs. Run it with onnxruntime.')
    dtypes = {'tensor(float)': np.float32, 'tensor(uint8)': np.uint8, 'tensor(int32)': np.int32}
    if arguments[0].type not in dtypes or not arguments[0].shape:
        raise ValueError(
            f'{path} takes a {arguments[0].type} of shape {arguments[0].shape}: it was not exported by bqat_jax.'
        )
    dtype, (batch, *shape) = dtypes[arguments[0].type], arguments[0].shape

    def run(inputs):
        return session.run(outputs, {arguments[0].name: np.asarray(inputs)})[0]

    return Exported(run, jax.ShapeDtypeStruct(tuple(shape), dtype), batch if isinstance(batch, int) else None)
