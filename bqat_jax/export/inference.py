"""Runs a frozen network on codes: every layer computes exact sums of codes and scales them with one product.

The network's module runs with its layers intercepted. Codes are float32, in which sums of integers are exact up to
2^24. If a layer's sums may get larger, its input is split into digits whose sums are exact, and these are combined in
int32. With `arithmetic='int8'` the operations take integers; the results are equal.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bqat_jax.blocks.block_network import PARAMS, BlockNetwork
from bqat_jax.export.codes import unpack_in_program
from bqat_jax.export.fitting import check_fits, check_network
from bqat_jax.export.frozen import BETWEEN, EXACT_IN_FLOAT32, INTEGER, Decoding, Frozen, FrozenLayer, carried
from bqat_jax.export.integers import as_integers, mark_whole
from bqat_jax.export.operations import LinearCall, carry, decode, encode, qcdq_input, qcdq_weights, sum_by_digits
from bqat_jax.export.watching import Watch, run_watched
from bqat_jax.interception import intercept_methods
from bqat_jax.transform.layers import intercept_layers, is_method_of

FLOAT32, INT8, QCDQ = 'float32', 'int8', 'qcdq'
ARITHMETIC = (FLOAT32, INT8)
# The entry of a layer's parameters, beside its kernel, with its frozen arrays.
SLOT = 'frozen'
# Integers up to this magnitude are exact in bfloat16, in which TPUs multiply by default.
EXACT_IN_BFLOAT16 = 256
Arrays = dict[str, Any]


def logits_function(frozen: Frozen, network: BlockNetwork, arithmetic: str = FLOAT32) -> Callable[[Any], Any]:
    """Returns `logits(inputs)`, the jitted frozen network.

    Args:
        frozen: the network as arrays.
        network: the `BlockNetwork` that was frozen.
        arithmetic: 'float32' for codes in float32, or 'int8' for products of integers. The results are equal.

    Returns:
        A function from a batch of inputs as in `Frozen.inputs`, such as uint8 images, to the network's outputs.

    Raises:
        TypeError: if `network` is not a `BlockNetwork`.
        ValueError: for another arithmetic, or a network with other parameters.
    """
    if arithmetic not in ARITHMETIC:
        raise ValueError(f'arithmetic={arithmetic!r}: it must be one of {", ".join(ARITHMETIC)}.')
    program = Program(frozen, network, arithmetic)
    check_fits(frozen, network)
    run, arrays = jax.jit(program.run), jax.device_put(arrays_of(frozen))
    return lambda inputs: run(arrays, inputs)


def arrays_of(frozen: Frozen) -> Arrays:
    """Returns the NumPy arrays for `Program.run`; codes of weights are int8 or uint8."""
    layers, codes = {}, {}
    for path, layer in frozen.layers.items():
        own: Arrays = {}
        if layer.weights is not None:
            codes[path] = layer.weights.codes
            own['weights'] = _decoding_arrays(layer.weights.decoding)
        if layer.inputs is not None:
            given = layer.inputs
            encoding = {'thresholds': given.thresholds, 'inverse_step': given.inverse_step}
            own['inputs'] = {name: x for name, x in encoding.items() if x is not None}
            own['inputs'] |= _decoding_arrays(given.decoding)
        if layer.rescale is not None:
            own['rescale'] = layer.rescale
        layers[path] = own
    arrays: Arrays = {
        'codes': codes,
        'layers': layers,
        'norms': {path: {'scale': scale, 'bias': bias} for path, (scale, bias) in frozen.norms.items()},
        'floats': dict(frozen.floats),
        'collections': {name: dict(own) for name, own in frozen.collections.items()},
    }
    if frozen.normalization is not None and frozen.inputs.dtype == np.uint8:
        arrays['pixels'] = frozen.normalization.table().ravel()
    return arrays


def packed_arrays_of(frozen: Frozen) -> Arrays:
    """Returns the arrays of `arrays_of` with packed codes, for `unpack_arrays`."""
    codes = {path: layer.weights.packed for path, layer in frozen.layers.items() if layer.weights is not None}
    return {**arrays_of(frozen), 'codes': codes}


def unpack_arrays(frozen: Frozen, arrays: Arrays) -> Arrays:
    """Unpacks the codes of `packed_arrays_of` within a traced program."""
    codes = {}
    for path, packed in arrays['codes'].items():
        weights: Any = frozen.layers[path].weights
        codes[path] = unpack_in_program(packed, weights.decoding.bits, weights.decoding.lower, weights.codes.shape)
    return {**arrays, 'codes': codes}


def _decoding_arrays(decoding: Decoding) -> Arrays:
    if decoding.levels is not None:
        return {'levels': decoding.levels}
    return {'shift': decoding.shift, 'scales': decoding.scales}


@dataclasses.dataclass(frozen=True)
class Program:
    """A frozen network as a program of arrays and inputs.

    Attributes:
        frozen: the network as arrays; only their shapes, not their values, are read here.
        network: the network.
        arithmetic: see `logits_function`; or 'qcdq', float32 products of quantized and dequantized values.
    """

    frozen: Frozen
    network: BlockNetwork
    arithmetic: str = FLOAT32

    def __post_init__(self):
        check_network(self.network)

    def run(self, arrays: Arrays, inputs: Any, watch: Watch | None = None) -> Any:
        """Returns the network's outputs for a batch.

        Args:
            arrays: the result of `arrays_of`.
            inputs: a batch of inputs as in `Frozen.inputs`.
            watch: records the codes of layers' inputs.
        """

        def run_float(arrays, inputs):
            return self._run(arrays, inputs, watch)

        return (as_integers(run_float) if self.arithmetic == INT8 else run_float)(arrays, inputs)

    def run_with_codes(self, arrays: Arrays, inputs: Any) -> tuple[Any, dict[str, list[jax.Array]]]:
        """Returns the outputs and, by layer, the codes of the input at each call, float32 (batch, ..)."""
        return run_watched(lambda watch: self.run(arrays, inputs, watch))

    def _run(self, arrays: Arrays, inputs: Any, watch: Watch | None) -> Any:
        def run_layer(call, module, path, x, args, kwargs):
            layer = self.frozen.layers.get(path)
            if layer is None or layer.inputs is None:
                return call(x)
            slot = module.get_variable(PARAMS, SLOT)
            if self.arithmetic == QCDQ:
                label = '' if watch is None else watch.label(path, x.ndim)
                return call(qcdq_input(layer.inputs, slot['inputs'], x, label))
            codes = encode(layer.inputs, slot['inputs'], x)
            if watch is not None:
                watch.see(path, codes)
            if layer.mode != INTEGER:
                return call(decode(layer.inputs.decoding, slot['inputs'], codes).astype(x.dtype))
            return self.run_integer(LinearCall(module, slot['kernel'], args, kwargs), layer, slot, codes)

        variables = self.variables(arrays)
        with affine_norms(self.frozen), intercept_layers(run_layer):
            return self.network.apply(variables, self._normalize(arrays, inputs), train=False)[0]

    def run_integer(self, call: LinearCall, layer: FrozenLayer, slot: Arrays, codes: jax.Array) -> jax.Array:
        """Returns the output of an integer layer: scaled sums of products of codes, plus the bias.

        Args:
            call: the call of the layer.
            layer: the frozen layer.
            slot: its arrays.
            codes: codes of its input.
        """
        inputs: Any = layer.inputs
        decoding, ends = inputs.decoding, np.array([inputs.decoding.lower, inputs.upper])
        numbers, largest = carry(decoding, codes), int(np.abs(carried(ends, decoding)).max())
        precision = 'highest' if largest > EXACT_IN_BFLOAT16 else None
        with contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision):
            if self.arithmetic == INT8:
                sums = call(mark_whole(numbers, largest))
            elif layer.largest_sum < EXACT_IN_FLOAT32:
                sums = call(numbers)
            else:
                sums = sum_by_digits(call, numbers, largest, layer.largest_kernel_sum)
            if not decoding.carries_whole_numbers:
                # The offset applies to the input alone: the layer pads zeros after the quantizer.
                ones = mark_whole(jnp.ones((1, *codes.shape[1:]), jnp.float32), 1)
                sums = sums + slot['inputs']['shift'] * call(ones)
        y = sums * call.beside(slot['rescale'], sums.ndim, only_kernel=True)
        bias = call.bias
        return y if bias is None else y + call.beside(bias, sums.ndim, only_kernel=False)

    def variables(self, arrays: Arrays) -> dict[str, Any]:
        """Returns the variables of the network's module: decoded kernels, and codes beside them."""
        flat: Arrays = dict(arrays['floats'])
        for path, layer in self.frozen.layers.items():
            slot = dict(arrays['layers'][path])
            if layer.weights is not None:
                decoding, codes = layer.weights.decoding, arrays['codes'][path].astype(jnp.float32)
                if self.arithmetic == QCDQ:
                    flat[layer.weight] = qcdq_weights(layer.weights, slot['weights'], codes)
                else:  # an integer layer's kernel is read only if the network shares it
                    flat[layer.weight] = decode(decoding, slot['weights'], codes)
                    if layer.mode == INTEGER:
                        ends = carried(np.array([layer.weights.codes.min(), layer.weights.codes.max()]), decoding)
                        slot['kernel'] = mark_whole(carry(decoding, codes), int(np.abs(ends).max()))
                del slot['weights']
            if slot:
                flat[f'{path}/{SLOT}'] = slot
        flat |= {f'{path}/{SLOT}': norm for path, norm in arrays['norms'].items()}
        tree = {PARAMS: traverse_util.unflatten_dict(flat, sep='/')}
        return tree | {name: traverse_util.unflatten_dict(x, sep=BETWEEN) for name, x in arrays['collections'].items()}

    def _normalize(self, arrays: Arrays, inputs: Any) -> Any:
        normalization = self.frozen.normalization
        if normalization is None:
            return inputs
        if 'pixels' not in arrays:
            mean, std = (np.array(x, np.float32) for x in (normalization.mean, normalization.std))
            return (inputs - mean.reshape(1, 1, 1, -1)) / std.reshape(1, 1, 1, -1)
        # A table, since programs may round a division by a constant differently.
        channels = inputs.shape[-1]
        places = inputs.astype(jnp.int32) * channels + np.arange(channels, dtype=np.int32).reshape(1, 1, 1, -1)
        return jnp.take(arrays['pixels'], places, mode='clip')


def affine_norms(frozen: Frozen) -> contextlib.AbstractContextManager:
    """Returns a context in which batch norms are affine."""

    def run_norm(call, args, kwargs, context):
        module = context.module
        if not is_batch_norm(context) or '/'.join(module.path) not in frozen.norms:
            return call(*args, **kwargs)
        return normalize_affine(module, args[0] if args else kwargs['x'])

    return intercept_methods(run_norm)


def is_batch_norm(context: Any) -> bool:
    """Returns whether an interceptor sees a call of `nn.BatchNorm` itself; a subclass may compute more."""
    return isinstance(context.module, nn.BatchNorm) and is_method_of(nn.BatchNorm, context.orig_method)


def normalize_affine(module: Any, x: jax.Array) -> jax.Array:
    """Returns x · scale + bias with the arrays in a batch norm's slot."""
    slot = module.get_variable(PARAMS, SLOT)
    scale, bias = (slot[name].reshape((1,) * (x.ndim - 1) + (-1,)) for name in ('scale', 'bias'))
    return (x.astype(jnp.float32) * scale + bias).astype(module.dtype or jnp.float32)
