"""Freezes single tensors: kernels become codes, inputs become thresholds or a step."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.export.frozen import Decoding, Inputs, Weights
from bqat_jax.export.thresholds import find_thresholds
from bqat_jax.quantizers import Quantizer, UniformQuantizer
from bqat_jax.quantizers.grids import code_dtype
from bqat_jax.transform.layers import KernelLayout
from bqat_jax.transform.quantization import LayerQuantizers, rescale_factor

# Inputs of up to this many bits have thresholds, so that no program can round them differently.
BITS_BY_THRESHOLDS = 4
# Numbers of codes in 4 and in 8 bits.
FEW_CODES, ALL_CODES = 16, 256


def freeze_weights(own: LayerQuantizers, parameters: Any, kernel: Any) -> Weights:
    """Returns the codes of a kernel.

    Every layer of a stack is quantized separately and eagerly, since a compiled program may round differently.

    Args:
        own: the layer's quantizers.
        parameters: parameters of the weights' quantizer.
        kernel: the layer's kernel in full precision.

    Raises:
        ValueError: if the codes do not decode to the fake-quantized kernel, bit for bit.
    """
    quantizer: Any = own.weights
    if np.asarray(kernel).dtype != np.float32:
        raise ValueError(f'its kernel is {np.asarray(kernel).dtype}, and export needs float32 parameters.')
    layout, single = own.layer.layout, _single(own)
    codes, decodings = [], []
    for parameters_of_one, kernel_of_one in _unstack(own.layer.stack, (parameters, jnp.asarray(kernel))):
        seen = layout.to_channels_last(kernel_of_one)
        prepared = quantizer.prepare(parameters_of_one, seen)
        factor = None
        if own.rescale != 'none':
            factor = rescale_factor(own.rescale, seen, quantizer.fake_quantize(parameters_of_one, seen))
        shape = kernel_of_one.shape
        codes.append(np.asarray(layout.from_channels_last(quantizer.encode(parameters_of_one, seen), shape)))
        decodings.append(_decoding(quantizer, prepared, factor, layout, shape))
        expected = np.asarray(single.quantize_weights(parameters_of_one, kernel_of_one))
        if not np.array_equal(decodings[-1].values(codes[-1]), expected):
            raise ValueError(
                f'the codes of its quantizer {quantizer.name!r} do not decode to the fake-quantized weights and cannot '
                'be exported.'
            )
    return Weights(
        _stacked(codes, own.layer.stack), _stack_decodings(decodings, own.layer.stack, len(own.layer.kernel))
    )


def freeze_inputs(own: LayerQuantizers, parameters: Any) -> Inputs:
    """Returns the encoding of a layer's input; `parameters` are those of the quantizer of activations."""
    quantizer: Any = own.activations
    layout = KernelLayout((0,))  # one axis: inputs have a single scale
    thresholds, steps, decodings = [], [], []
    for (of_one,) in _unstack(own.layer.stack, (parameters,)):
        decodings.append(_decoding(quantizer, of_one, None, layout, (1,)))
        lower, upper = quantizer.lower, quantizer.upper

        def encode(x, of_one=of_one):
            return np.asarray(quantizer.encode(of_one, jnp.asarray(x)))

        layer_thresholds = find_thresholds(encode, lower, upper)
        thresholds.append(layer_thresholds[0])
        steps.append(_inverse_step(quantizer, of_one, layer_thresholds))
    has_steps = all(step is not None for step in steps)
    by_steps = has_steps and quantizer.bits > BITS_BY_THRESHOLDS
    return Inputs(
        _stack_decodings(decodings, own.layer.stack, 0),
        quantizer.upper,
        None if by_steps else _stacked(thresholds, own.layer.stack),
        _stacked(steps, own.layer.stack) if has_steps else None,
    )


def _inverse_step(quantizer: Quantizer, parameters: Any, thresholds: np.ndarray) -> np.ndarray | None:
    """1 / step, if clip(round(x · (1 / step))) has the quantizer's thresholds; else None."""
    if not isinstance(quantizer, UniformQuantizer):
        return None
    inverse = np.float32(1) / np.asarray(quantizer.grid(parameters)[0], np.float32)

    def encode(x):
        with np.errstate(invalid='ignore', over='ignore'):
            return np.clip(np.round(x * inverse), quantizer.lower, quantizer.upper)

    same = np.array_equal(find_thresholds(encode, quantizer.lower, quantizer.upper), thresholds, equal_nan=True)
    return inverse if same else None


def _decoding(quantizer: Any, prepared: Any, factor: Any, layout: KernelLayout, shape: tuple[int, ...]) -> Decoding:
    """The decoding of one tensor; a table of levels if (code + shift) · scale gives other values than the quantizer."""
    codes = np.arange(quantizer.lower, quantizer.upper + 1)
    # Padded with the largest code: JAX compiles an eager `decode` for every shape.
    filled = np.pad(codes, (0, (FEW_CODES if len(codes) <= FEW_CODES else ALL_CODES) - len(codes)), mode='edge')
    channels = [shape[axis] for axis in layout.permutation[len(shape) - layout.outputs :]]
    per_channel = quantizer.channel_axis is not None
    # All codes along the first axis of a tensor with all output channels, in the quantizer's layout.
    ndim = 2 if layout.is_matrix else len(shape)
    given = filled.reshape(-1, *(1,) * (ndim - 1))
    if per_channel:
        given = np.repeat(given, math.prod(channels), axis=-1)
    table = np.asarray(quantizer.decode(prepared, jnp.asarray(given, code_dtype(quantizer.lower))))
    if factor is not None:
        table = table * np.asarray(factor, np.float32)
    table = table.reshape(len(filled), -1)[: len(codes)]  # (codes, channels)

    def place(values):
        """Reshapes values, () or one per channel, to broadcast against the kernel."""
        values = np.asarray(values, np.float32)
        if values.size == 1:
            return values.reshape(())
        outputs = len(shape) - layout.outputs
        whole = values.reshape([1] * outputs + channels)
        return np.transpose(whole, [layout.permutation.index(axis) for axis in range(len(shape))])

    if isinstance(quantizer, UniformQuantizer):
        step, shift = quantizer.grid(prepared)
        scales = [place(scale) for scale in (step, quantizer.output(prepared), factor) if scale is not None]
        uniform = Decoding(quantizer.bits, quantizer.lower, place(shift), tuple(scales))
        whole = place(np.zeros(math.prod(channels) if per_channel else 1)).shape
        tries = [uniform.values(np.full(whole, code)) for code in codes]
        expected = [np.broadcast_to(place(row), one.shape) for row, one in zip(table, tries, strict=True)]
        if np.array_equal(np.stack(tries), np.stack(expected)):
            return uniform
    rows = [place(row) for row in table]
    return Decoding(quantizer.bits, quantizer.lower, np.zeros((), np.float32), (), np.stack(rows, axis=-1))


def _single(own: LayerQuantizers) -> LayerQuantizers:
    """The quantizers of one layer of a stack."""
    return dataclasses.replace(own, layer=dataclasses.replace(own.layer, stack=()))


def _unstack(stack: tuple[int, ...], trees: Any) -> list[Any]:
    """The trees of the layers of a stack, whose axes come first."""
    if not stack:
        return [jax.tree.map(jnp.asarray, trees)]
    depth, count = len(stack), math.prod(stack)
    flat = jax.tree.map(lambda x: jnp.asarray(x).reshape(count, *x.shape[depth:]), trees)
    return [jax.tree.map(lambda x: x[number], flat) for number in range(count)]  # noqa: B023


def _stacked(arrays: Any, stack: tuple[int, ...]) -> np.ndarray:
    whole = np.stack([np.asarray(x) for x in arrays])
    return whole.reshape((*stack, *whole.shape[1:]))


def _stack_decodings(decodings: list[Decoding], stack: tuple[int, ...], ndim: int) -> Decoding:
    """One decoding for a stack of layers whose codes have `ndim` axes; scales that are all 1 are omitted."""

    def whole(arrays):
        # One number per layer gets axes of length 1 to broadcast.
        return _stacked([x.reshape(x.shape or (1,) * ndim) for x in arrays], stack) if stack else arrays[0]

    first = decodings[0]
    if any(one.levels is None for one in decodings):
        if any(one.levels is not None for one in decodings):
            raise ValueError('Some layers of a stack have equidistant values and others do not.')
        turns = zip(*(one.scales for one in decodings), strict=True)
        scales = tuple(whole(turn) for turn in turns if not all(np.all(x == 1) for x in turn))
        return dataclasses.replace(first, shift=whole([one.shift for one in decodings]), scales=scales)
    if not stack:
        return first
    tables: Any = [one.levels for one in decodings]
    tables = [x.reshape(x.shape if x.ndim > 1 else (*(1,) * ndim, -1)) for x in tables]
    return dataclasses.replace(first, levels=_stacked(tables, stack))
