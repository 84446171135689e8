"""Runs a frozen network: codes in, exact sums of codes, one product a layer that scales them.

The network's own module runs, with its layers intercepted. Codes are carried as float32, in which sums of whole numbers
are exact up to 2^24. Where a layer's may get larger its input is divided into digits, whose sums are exact, and these
are put together in int32. With `arithmetic='int8'` the operations themselves take integers; the results are the same.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bqat_jax.blocks.block_network import PARAMS, BlockNetwork
from bqat_jax.export.codes import unpack_in_program
from bqat_jax.export.frozen import (
    EXACT_IN_FLOAT32,
    INTEGER,
    Decoding,
    Frozen,
    FrozenLayer,
    Inputs,
    carried,
)
from bqat_jax.export.integers import as_integers, mark_whole
from bqat_jax.interception import intercept_methods
from bqat_jax.transform.layers import WEIGHT_NAME, einsum_terms, intercept_layers, layer_class
from bqat_jax.transform.tagging import run_and_collect, tag

FLOAT32, INT8 = 'float32', 'int8'
ARITHMETIC = (FLOAT32, INT8)
# Where, beside a layer's kernel, what is known of its input and its output lies.
SLOT = 'frozen'
# So many thresholds are compared one by one; more are searched.
MOST_COMPARED = 15
# Whole numbers up to here are exact in bfloat16, in which a TPU multiplies if it is not told otherwise.
EXACT_IN_BFLOAT16 = 256
Arrays = dict[str, Any]


def logits_function(frozen: Frozen, network: BlockNetwork, arithmetic: str = FLOAT32) -> Callable[[Any], Any]:
    """Returns `logits(inputs)`, the jitted frozen network.

    Args:
        frozen: the network as arrays.
        network: the network.
        arithmetic: 'float32', codes carried in float32; or 'int8', products of integers. The results are equal.

    Returns:
        From a batch of inputs as of `Frozen.inputs`, such as uint8 images, to the network's outputs.

    Raises:
        ValueError: for another arithmetic.
    """
    program = Program(frozen, network, arithmetic)
    run, arrays = jax.jit(program.run), jax.device_put(arrays_of(frozen))
    return lambda inputs: run(arrays, inputs)


def arrays_of(frozen: Frozen) -> Arrays:
    """Returns the arrays that `Program.run` takes, NumPy; codes of weights are int8 or uint8."""
    layers, codes = {}, {}
    for path, layer in frozen.layers.items():
        own: Arrays = {}
        if layer.weights is not None:
            codes[path] = layer.weights.codes
            own['weights'] = _decoding_arrays(layer.weights.decoding)
        if layer.inputs is not None:
            given = layer.inputs
            found = {'thresholds': given.thresholds, 'inverse_step': given.inverse_step}
            own['inputs'] = {name: x for name, x in found.items() if x is not None}
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
    """Returns the same with packed codes, to be unpacked by `unpack_arrays`."""
    codes = {path: layer.weights.packed for path, layer in frozen.layers.items() if layer.weights is not None}
    return {**arrays_of(frozen), 'codes': codes}


def unpack_arrays(frozen: Frozen, arrays: Arrays) -> Arrays:
    """Returns arrays with unpacked codes, in a traced program."""
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
        frozen: the network as arrays; of these only shapes and what is no array are read here.
        network: the network.
        arithmetic: see `logits_function`.
    """

    frozen: Frozen
    network: BlockNetwork
    arithmetic: str = FLOAT32

    def __post_init__(self):
        if self.arithmetic not in ARITHMETIC:
            raise ValueError(f'arithmetic={self.arithmetic!r}: it must be one of {", ".join(ARITHMETIC)}.')

    def run(self, arrays: Arrays, inputs: Any) -> Any:
        """Returns the network's outputs for a batch.

        Args:
            arrays: as `arrays_of` returns them.
            inputs: as of `Frozen.inputs`, with a batch axis.
        """
        run = as_integers(self._run) if self.arithmetic == INT8 else self._run
        return run(arrays, inputs)

    def run_with_codes(self, arrays: Arrays, inputs: Any) -> tuple[Any, dict[str, list[jax.Array]]]:
        """Returns the outputs, and the codes of every layer's input at each of its calls, float32 (batch, ..)."""
        run = as_integers(self._run) if self.arithmetic == INT8 else self._run
        return observe_codes(lambda look: lambda: run(arrays, inputs, look))

    def _run(self, arrays: Arrays, inputs: Any, look: Callable[[str, jax.Array], None] | None = None) -> Any:
        def run_layer(call, module, path, x, args, kwargs):
            layer = self.frozen.layers.get(path)
            if layer is None or layer.inputs is None:
                return call(x)
            slot = module.get_variable(PARAMS, SLOT)
            codes = encode(layer.inputs, slot['inputs'], x)
            if look is not None:
                look(path, codes)
            if layer.mode != INTEGER:
                return call(decode(layer.inputs.decoding, slot['inputs'], codes).astype(x.dtype))
            return self._run_integer(LinearCall(module, args, kwargs), layer, slot, codes)

        variables = self._variables(arrays)
        with _affine_norms(self.frozen), intercept_layers(run_layer):
            return self.network.apply(variables, self._normalize(arrays, inputs), train=False)[0]

    def _run_integer(self, call: 'LinearCall', layer: FrozenLayer, slot: Arrays, codes: Any) -> Any:
        """Sums of products of codes, scaled, and the bias."""
        inputs: Any = layer.inputs
        decoding, ends = inputs.decoding, np.array([inputs.decoding.lower, inputs.upper])
        numbers, largest = _carry(decoding, codes), int(np.abs(carried(ends, decoding)).max())
        precision = 'highest' if largest > EXACT_IN_BFLOAT16 else None
        with contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision):
            if self.arithmetic == INT8:
                sums = call(mark_whole(numbers, largest))
            elif layer.largest_sum < EXACT_IN_FLOAT32:
                sums = call(numbers)
            else:
                sums = _by_digits(call, numbers, largest, layer.largest_kernel_sum)
            if not decoding.carries_whole_numbers:
                # The offset counts where there is input: a border of zeros is padded behind the quantizer.
                ones = mark_whole(jnp.ones((1, *codes.shape[1:]), jnp.float32), 1)
                sums = sums + slot['inputs']['shift'] * call(ones)
        y = sums * call.beside(slot['rescale'], sums.ndim, only_kernel=True)
        bias = call.bias
        return y if bias is None else y + call.beside(bias, sums.ndim, only_kernel=False)

    def _variables(self, arrays: Arrays) -> dict[str, Any]:
        """The variables that the network's module is run with: kernels of codes or of values, with what they need."""
        flat: Arrays = dict(arrays['floats'])
        for path, layer in self.frozen.layers.items():
            slot = dict(arrays['layers'][path])
            if layer.weights is not None:
                decoding, codes = layer.weights.decoding, arrays['codes'][path].astype(jnp.float32)
                if layer.mode == INTEGER:
                    ends = carried(np.array([layer.weights.codes.min(), layer.weights.codes.max()]), decoding)
                    flat[layer.weight] = mark_whole(_carry(decoding, codes), int(np.abs(ends).max()))
                else:
                    flat[layer.weight] = decode(decoding, slot['weights'], codes)
                del slot['weights']
            if slot:
                flat[f'{path}/{SLOT}'] = slot
        flat |= {f'{path}/{SLOT}': norm for path, norm in arrays['norms'].items()}
        tree = {PARAMS: traverse_util.unflatten_dict(flat, sep='/')}
        return tree | {name: traverse_util.unflatten_dict(x, sep='/') for name, x in arrays['collections'].items()}

    def _normalize(self, arrays: Arrays, inputs: Any) -> Any:
        normalization = self.frozen.normalization
        if normalization is None:
            return inputs
        if 'pixels' not in arrays:
            mean, std = (np.array(x, np.float32) for x in (normalization.mean, normalization.std))
            return (inputs - mean.reshape(1, 1, 1, -1)) / std.reshape(1, 1, 1, -1)
        # Looked up: what a division by a constant gives is not the same in all programs.
        channels = inputs.shape[-1]
        places = inputs.astype(jnp.int32) * channels + np.arange(channels, dtype=np.int32).reshape(1, 1, 1, -1)
        return jnp.take(arrays['pixels'], places, mode='clip')


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """A call of a layer that is linear in its input, up to its bias: the same on other inputs, without the bias.

    Attributes:
        module: the layer, bound.
        args: what it is called with beside its input.
        kwargs: the same, by keyword.
    """

    module: Any
    args: Any
    kwargs: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the layer's output for another input, without the bias."""
        cls: Any = layer_class(self.module)
        # A copy outside of the network: Flax lets a layer make its parameters once in a call.
        copy = self.module.clone(parent=None, name=None, use_bias=False)
        own = {PARAMS: {WEIGHT_NAME: self.module.get_variable(PARAMS, WEIGHT_NAME)}}
        return copy.apply(own, x, method=lambda copy, x: cls.__call__(copy, x, *self.args, **self.kwargs))

    @property
    def bias(self) -> Any:
        """The layer's bias, or None."""
        return self.module.get_variable(PARAMS, 'bias') if self.module.use_bias else None

    def beside(self, values: Any, ndim: int, *, only_kernel: bool) -> Any:
        """Returns values of output channels in a shape that broadcasts against an output of `ndim` axes.

        Args:
            values: () or with the axes of the output channels.
            ndim: of the output.
            only_kernel: of an `nn.Einsum`, whether the axes of values are the kernel's letters that the input has not,
                in the kernel's order; or all letters of the kernel that the output has, in the output's order.
        """
        if values.ndim == 0:
            return values
        if not isinstance(self.module, nn.Einsum):
            return values.reshape((1,) * (ndim - values.ndim) + values.shape)
        left, kernel, out = einsum_terms(self.module, self.args, self.kwargs)
        letters = out.replace('...', '')
        # What an ellipsis stands for has an axis of its own for each, and no letter.
        start = out.index('...') if '...' in out else len(letters)
        axes = [*letters[:start], *[None] * (ndim - len(letters)), *letters[start:]]
        taken = [x for x in kernel if x in letters and x not in left]
        own = taken if only_kernel else [x for x in letters if x in kernel]
        values = jnp.transpose(values, [own.index(x) for x in letters if x in own])
        sizes = iter(values.shape)
        return values.reshape([next(sizes) if axis in own else 1 for axis in axes])


def observe_codes(make: Callable[[Callable[[str, jax.Array], None]], Callable[[], Any]]) -> tuple[Any, dict[str, Any]]:
    """Runs a network whose layers' inputs are looked at.

    Args:
        make: `make(look)` returns a function that runs the network and calls `look(path, codes)` in every layer.

    Returns:
        The outputs, and for every path the codes at each of the layer's calls, (batch, ..).
    """
    paths: dict[str, int] = {}
    axes: dict[str, int] = {}

    def look(path, codes):
        axes[path] = codes.ndim
        tag(paths.setdefault(path, len(paths)), [codes])

    outputs, collected = run_and_collect(make(look))
    by_path: dict[str, list[jax.Array]] = {}
    for path, number in paths.items():
        by_path[path] = []
        for (codes,) in collected[number]:  # in a loop those of all iterations, along leading axes
            shape = codes.shape[codes.ndim - axes[path] :]
            by_path[path] += [*codes.reshape(-1, *shape)] if codes.ndim > axes[path] else [codes]
    return outputs, by_path


def encode(inputs: Inputs, slot: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Returns the codes of an input, float32; see `bqat_jax.export.frozen`."""
    x = x.astype(jnp.float32)
    lower = inputs.decoding.lower
    if 'inverse_step' in slot:
        return jnp.clip(jnp.round(x * slot['inverse_step']), lower, inputs.upper)
    thresholds, count = slot['thresholds'], inputs.upper - lower
    if count <= MOST_COMPARED:
        reached = [(x >= thresholds[number]).astype(jnp.float32) for number in range(count)]
        return functools.reduce(jnp.add, reached) + lower
    # A binary search without branches, over thresholds filled up with ones that are never reached.
    size = 1 << count.bit_length()
    table = jnp.concatenate([thresholds, jnp.full(size - count, jnp.nan, jnp.float32)])
    position = jnp.zeros(x.shape, jnp.int32)
    step = size // 2
    while step:
        reached = x >= jnp.take(table, position + (step - 1), mode='clip')
        position = position + step * reached.astype(jnp.int32)
        step //= 2
    return position.astype(jnp.float32) + lower


def decode(decoding: Decoding, slot: Mapping[str, Any], codes: jax.Array) -> jax.Array:
    """Returns what codes, float32, stand for; see `bqat_jax.export.frozen`."""
    if not decoding.is_uniform:
        levels = slot['levels']
        places = (codes - decoding.lower).astype(jnp.int32)
        count = levels.shape[-1]
        rows = np.arange(levels.size // count, dtype=np.int32).reshape(levels.shape[:-1])
        if rows.ndim:
            places = places + (rows * count).reshape((1,) * (codes.ndim - rows.ndim) + rows.shape)
        return jnp.take(levels.reshape(-1), places, mode='clip')
    value = codes + slot['shift']
    for scale in slot['scales']:
        value = value * scale
    return value


def _carry(decoding: Decoding, codes: jax.Array) -> jax.Array:
    """Codes as the whole numbers that are multiplied; see `carried`."""
    return codes * 2 + 1 if decoding.has_half_shift else codes


def _by_digits(call: Callable[..., Any], numbers: jax.Array, largest: int, kernel_sum: int) -> jax.Array:
    """Sums too large for float32, of digits whose sums are exact: Σ w · x = Σ_i base^i · Σ w · digit_i."""
    base = 1 << ((EXACT_IN_FLOAT32 - 1) // kernel_sum + 1).bit_length() - 1
    total, weight = None, 1
    while True:
        is_last = largest < base
        digit = numbers if is_last else numbers - jnp.floor(numbers / base) * base
        sums = call(digit).astype(jnp.int32) * weight
        total = sums if total is None else total + sums
        if is_last:
            return total.astype(jnp.float32)
        numbers, largest, weight = jnp.floor(numbers / base), largest // base + 1, weight * base


def _affine_norms(frozen: Frozen) -> contextlib.AbstractContextManager:
    """A context in which batch norms are a product and a sum."""

    def run_norm(call, args, kwargs, context):
        module = context.module
        is_norm = isinstance(module, nn.BatchNorm) and context.method_name == '__call__'
        if not is_norm or '/'.join(module.path) not in frozen.norms:
            return call(*args, **kwargs)
        x, slot = args[0], module.get_variable(PARAMS, SLOT)
        scale, bias = (slot[name].reshape((1,) * (x.ndim - 1) + (-1,)) for name in ('scale', 'bias'))
        return (x.astype(jnp.float32) * scale + bias).astype(module.dtype or x.dtype)

    return intercept_methods(run_norm)
