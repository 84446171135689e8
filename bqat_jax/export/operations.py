"""The computations of a frozen layer as JAX operations."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.blocks.block_network import PARAMS
from bqat_jax.export.frozen import EXACT_IN_FLOAT32, Decoding, Inputs, Weights, carried, carried_step
from bqat_jax.export.qcdq import dequantize_weights, quantize_input
from bqat_jax.transform.layers import WEIGHT_NAME, einsum_terms, layer_class

# The most thresholds that are compared one by one; more use a binary search.
MOST_COMPARED = 15


def encode(inputs: Inputs, slot: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """Returns the codes of an input, float32; see `bqat_jax.export.frozen`."""
    x = x.astype(jnp.float32)
    lower = inputs.decoding.lower
    if 'thresholds' not in slot:
        return jnp.clip(jnp.round(x * slot['inverse_step']), lower, inputs.upper)
    thresholds, count = slot['thresholds'], inputs.upper - lower
    if count <= MOST_COMPARED:
        reached = [(x >= thresholds[number]).astype(jnp.float32) for number in range(count)]
        return functools.reduce(jnp.add, reached) + lower
    # A branch-free binary search over thresholds padded with NaN, which no number reaches.
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
    """Returns the values of float32 codes; see `bqat_jax.export.frozen`."""
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


def qcdq_input(inputs: Inputs, slot: Mapping[str, Any], x: jax.Array, label: str) -> jax.Array:
    """Returns an input quantized and dequantized in the QCDQ format; `label` names the codes."""
    step = functools.reduce(jnp.multiply, slot['scales'])
    return quantize_input(x.astype(jnp.float32), step, inputs.decoding.lower, inputs.upper, label).astype(x.dtype)


def qcdq_weights(weights: Weights, slot: Mapping[str, Any], codes: jax.Array) -> jax.Array:
    """Returns a kernel dequantized in the QCDQ format; codes are float32."""
    decoding = weights.decoding
    ends = carried(np.array([decoding.lower, decoding.lower + 2**decoding.bits - 1]), decoding)
    scale = functools.reduce(jnp.multiply, slot['scales'], jnp.float32(carried_step(decoding)))
    return dequantize_weights(carry(decoding, codes), scale, int(ends[0]), int(ends[1]))


def carry(decoding: Decoding, codes: jax.Array) -> jax.Array:
    """Returns the integers that stand for codes in products; see `carried`."""
    return codes * 2 + 1 if decoding.has_half_shift else codes


def sum_by_digits(call: Callable[..., Any], numbers: jax.Array, largest: int, kernel_sum: int) -> jax.Array:
    """Computes sums too large for float32 from digits whose sums are exact: Σ w · x = Σ_i base^i · Σ w · digit_i."""
    base = 1 << ((EXACT_IN_FLOAT32 - 1) // kernel_sum + 1).bit_length() - 1
    total, weight = None, 1
    while True:
        is_last = largest < base
        digit = numbers if is_last else numbers - jnp.floor(numbers / base) * base
        sums = call(digit).astype(jnp.int32) * weight
        total = sums if total is None else total + sums
        if is_last:
            return total.astype(jnp.float32)
        numbers, largest, weight = jnp.floor(numbers / base), -(-largest // base), weight * base


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """A call of a linear layer with another input and kernel, without the bias.

    Attributes:
        module: the bound layer.
        kernel: the kernel to use.
        args: further positional arguments of the call.
        kwargs: keyword arguments of the call.
    """

    module: Any
    kernel: Any
    args: Any
    kwargs: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the layer's output for another input, without the bias."""
        cls: Any = layer_class(self.module)
        # A copy outside of the network: in Flax a layer may create its parameters only once per call.
        copy = self.module.clone(parent=None, name=None, use_bias=False)
        own = {PARAMS: {WEIGHT_NAME: self.kernel}}
        return copy.apply(own, x, method=lambda copy, x: cls.__call__(copy, x, *self.args, **self.kwargs))

    @property
    def bias(self) -> Any:
        """The layer's bias, or None."""
        return self.module.get_variable(PARAMS, 'bias') if self.module.use_bias else None

    def beside(self, values: Any, ndim: int, *, only_kernel: bool) -> Any:
        """Returns values of output channels in a shape that broadcasts against an output of `ndim` axes.

        Args:
            values: () or with the axes of the output channels.
            ndim: rank of the output.
            only_kernel: for an `nn.Einsum`: True if the axes of `values` are the kernel's letters that the input lacks,
                in the kernel's order; False if they are all letters of kernel and output, in the output's order.
        """
        if values.ndim == 0:
            return values
        if not isinstance(self.module, nn.Einsum):
            return values.reshape((1,) * (ndim - values.ndim) + values.shape)
        left, kernel, out = einsum_terms(self.module, self.args, self.kwargs)
        letters = out.replace('...', '')
        # An ellipsis represents axes without letters.
        start = out.index('...') if '...' in out else len(letters)
        axes = [*letters[:start], *[None] * (ndim - len(letters)), *letters[start:]]
        taken = [x for x in kernel if x in letters and x not in left]
        own = taken if only_kernel else [x for x in letters if x in kernel]
        values = jnp.transpose(values, [own.index(x) for x in letters if x in own])
        sizes = iter(values.shape)
        return values.reshape([next(sizes) if axis in own else 1 for axis in axes])
