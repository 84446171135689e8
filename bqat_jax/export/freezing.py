"""Freezes a trained network: quantizers become codes, thresholds and scales; batch norms become a product and a sum."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.interpreters.partial_eval import dce_jaxpr

from bqat_jax.blocks.block_network import BATCH_STATS, PARAMS, PASSING, BlockNetwork
from bqat_jax.export.frozen import (
    EXACT_IN_FLOAT32,
    EXACT_IN_INT32,
    INTEGER,
    LOOKUP,
    Decoding,
    Frozen,
    FrozenLayer,
    Inputs,
    Normalization,
    Weights,
    carried,
    carried_step,
)
from bqat_jax.export.thresholds import find_thresholds
from bqat_jax.interception import intercept_methods
from bqat_jax.quantizers import Quantizer, UniformQuantizer
from bqat_jax.quantizers.grids import code_dtype
from bqat_jax.replacement.paths import Variables
from bqat_jax.transform import Quantization
from bqat_jax.transform.layers import WEIGHT_NAME, KernelLayout, intercept_layers, layer_class
from bqat_jax.transform.quantization import LayerQuantizers, rescale_factor

# Layers whose output is linear in their input and in their kernel, up to a bias called 'bias'.
LINEAR = (nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Dense, nn.DenseGeneral, nn.Einsum)
# Inputs of so many bits have thresholds, so that no program can round them otherwise.
BITS_BY_THRESHOLDS = 4


@dataclasses.dataclass(frozen=True)
class _Norm:
    """A batch norm, as it is called: its settings."""

    epsilon: float
    use_scale: bool
    use_bias: bool


def freeze(
    network: BlockNetwork,
    quantization: Quantization,
    variables: Variables,
    *,
    normalization: Normalization | None = None,
    inputs: Any = None,
    description: Mapping[str, Any] | None = None,
) -> Frozen:
    """Returns a trained network as plain arrays.

    Args:
        network: what was trained.
        quantization: its quantizers.
        variables: its arrays, of one network.
        normalization: what happens to images before the network gets them; None for nothing.
        inputs: shapes and dtypes of one example before that; the network's own if None.
        description: what the network is, as JSON.

    Raises:
        ValueError: for a layer whose sums do not fit 32 bits, or arrays that are not finite.
    """
    variables = jax.device_get(variables)
    flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
    linear, norms = _look_at_layers(network, variables)
    layers = {}
    for path, own in quantization.layers.items():
        weight = quantization.weight_path(path)
        layers[path] = freeze_layer(path, own, weight, flat, variables.quantizers.get(path, {}), path in linear)
    stats: Any = traverse_util.flatten_dict(variables.collections.get(BATCH_STATS, {}), sep='/')
    affine = {path: _freeze_norm(path, norm, flat, stats) for path, norm in norms.items()}
    taken = {layer.weight for layer in layers.values() if layer.weights is not None}
    taken |= {f'{path}/{name}' for path in norms for name in ('scale', 'bias')}
    read = {f'{path}/{name}' for path in norms for name in ('mean', 'var')}
    collections = {name: tree for name, tree in variables.collections.items() if name not in PASSING}
    frozen = Frozen(
        layers=layers,
        norms=affine,
        floats={path: np.asarray(x) for path, x in flat.items() if path not in taken},
        collections={
            name: {
                path: np.asarray(x) for path, x in traverse_util.flatten_dict(tree, sep='/').items() if path not in read
            }
            for name, tree in collections.items()
        },
        inputs=network.inputs if inputs is None else inputs,
        normalization=normalization,
        network=description,
    )
    _check_finite(frozen)
    return frozen


def _look_at_layers(network: BlockNetwork, variables: Variables) -> tuple[set[str], dict[str, _Norm]]:
    """Paths of layers that can multiply codes, and the batch norms, by a run on shapes."""
    linear: dict[str, bool] = {}
    norms: dict[str, _Norm | None] = {}

    def look(call, module, path, x, args, kwargs):
        y = call(x)
        is_known = layer_class(module) in LINEAR and x.dtype == jnp.float32
        linear[path] = is_known and y.dtype == jnp.float32 and linear.get(path, True)
        return y

    def look_at_norm(call, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.BatchNorm) and context.method_name == '__call__':
            path = '/'.join(module.path)
            norm = _Norm(module.epsilon, module.use_scale, module.use_bias)
            if module.axis not in (-1, (-1,), args[0].ndim - 1) or norms.get(path, norm) != norm:
                norms[path] = None
            else:
                norms.setdefault(path, norm)
        return call(*args, **kwargs)

    def run(variables, inputs):
        return network.apply(variables, inputs, train=False)[0]

    with intercept_methods(look_at_norm), intercept_layers(look):
        jax.eval_shape(run, variables.of_network, network.batch_of(1))
    found = {path for path, holds in linear.items() if holds}
    return found - _read_elsewhere(network, variables, found), {k: x for k, x in norms.items() if x is not None}


def _read_elsewhere(network: BlockNetwork, variables: Variables, layers: set[str]) -> set[str]:
    """Those layers whose kernel the network reads by itself too, as a layer that shares its weights does.

    In a run in which the layers give zeros the outputs depend on such kernels alone.
    """

    def blank(call, module, path, x, args, kwargs):
        y = call(x)
        return jnp.zeros(y.shape, y.dtype) if path in layers else y

    def run(kernels, variables, inputs):
        flat: Any = traverse_util.flatten_dict(variables[PARAMS], sep='/')
        params = traverse_util.unflatten_dict({**flat, **kernels}, sep='/')
        return jax.tree.leaves(network.apply({**variables, PARAMS: params}, inputs, train=False)[0])

    flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
    kernels = {f'{path}/{WEIGHT_NAME}': flat[f'{path}/{WEIGHT_NAME}'] for path in sorted(layers)}
    with intercept_layers(blank):
        program = jax.make_jaxpr(run)(kernels, variables.of_network, network.batch_of(1)).jaxpr
    _, is_read = dce_jaxpr(program, [True] * len(program.outvars))
    return {path for path, read in zip(sorted(layers), is_read, strict=False) if read}


def _freeze_norm(
    path: str, norm: _Norm, params: Mapping[str, Any], stats: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(scale, bias) with y = x · scale + bias, computed in float64."""
    mean, variance = (np.asarray(stats[f'{path}/{name}'], np.float64) for name in ('mean', 'var'))
    scale = 1 / np.sqrt(variance + norm.epsilon)
    if norm.use_scale:
        scale = scale * np.asarray(params[f'{path}/scale'], np.float64)
    bias = -mean * scale
    if norm.use_bias:
        bias = bias + np.asarray(params[f'{path}/bias'], np.float64)
    return scale.astype(np.float32), bias.astype(np.float32)


def freeze_layer(
    path: str, own: LayerQuantizers, weight: str, params: Mapping[str, Any], parameters: Any, is_linear: bool
) -> FrozenLayer:
    """Returns a quantized layer, frozen.

    Args:
        path: of the layer, for messages.
        own: its quantizers.
        weight: path of its kernel.
        params: path to parameter of the network.
        parameters: of its quantizers, by role.
        is_linear: whether its output is linear in its input and its kernel, up to a bias.

    Raises:
        ValueError: if sums of its codes do not fit 32 bits, or as `freeze_weights`.
    """
    weights = inputs = None
    if own.weights is not None:
        weights = freeze_weights(own, parameters['weights'], params[weight])
    if own.activations is not None:
        inputs = freeze_inputs(own, parameters['activations'])
    layer = FrozenLayer(own.layer.kind, weight, LOOKUP, weights, inputs)
    if not is_linear or weights is None or inputs is None:
        return layer
    if not (weights.decoding.carries_whole_numbers and inputs.decoding.is_uniform):
        return layer
    return _as_integer(path, layer, own, weights, inputs)


def _as_integer(path: str, layer: FrozenLayer, own: LayerQuantizers, weights: Weights, inputs: Inputs) -> FrozenLayer:
    """The layer as one that multiplies codes: what its sums are scaled by, and how large they get."""
    depth = len(own.layer.stack)
    kernel = np.abs(carried(weights.codes, weights.decoding))
    layout = own.layer.layout
    outputs = tuple(depth + axis for axis in layout.permutation[len(layout.permutation) - layout.outputs :])
    summed = tuple(axis for axis in range(depth, kernel.ndim) if axis not in outputs)
    kernel_sum = int(kernel.sum(axis=summed).max(initial=0))
    ends = carried(np.array([inputs.decoding.lower, inputs.upper]), inputs.decoding)
    largest = int(np.abs(ends).max()) * kernel_sum
    if largest >= EXACT_IN_INT32 or kernel_sum >= EXACT_IN_FLOAT32:
        raise ValueError(
            f'The layer {path}: sums of its codes may reach {largest}, which 32 bits do not hold. Give it fewer bits, '
            'or leave it in full precision.'
        )
    scale = weights.decoding.scale * carried_step(weights.decoding)
    if scale.ndim:  # of the kernel's axes those of the output channels are left, in the kernel's order
        scale = scale.reshape([size for axis, size in enumerate(scale.shape) if axis not in summed])
        if all(size == 1 for size in scale.shape[depth:]):
            scale = scale.reshape(scale.shape[:depth])
    of_inputs = inputs.decoding.scale * carried_step(inputs.decoding)
    of_inputs = of_inputs.reshape(of_inputs.shape + (1,) * (scale.ndim - of_inputs.ndim))
    return dataclasses.replace(
        layer,
        mode=INTEGER,
        rescale=(scale * of_inputs).astype(np.float32),
        largest_sum=largest,
        largest_kernel_sum=kernel_sum,
    )


def freeze_weights(own: LayerQuantizers, parameters: Any, kernel: Any) -> Weights:
    """Returns the codes of a kernel.

    Every layer of a stack is quantized by itself and eagerly, as a compiled program may round otherwise.

    Args:
        own: the layer's quantizers.
        parameters: of the weights' quantizer.
        kernel: in full precision, as the layer has it.

    Raises:
        ValueError: if the codes do not decode to the fake-quantized kernel, bit for bit.
    """
    quantizer: Any = own.weights
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
                f'The quantizer {quantizer.name!r}: what its codes decode to is not what it quantizes to, so that they '
                'cannot stand for its weights.'
            )
    return Weights(
        _stacked(codes, own.layer.stack), _stack_decodings(decodings, own.layer.stack, len(own.layer.kernel))
    )


def freeze_inputs(own: LayerQuantizers, parameters: Any) -> Inputs:
    """Returns how a layer's input becomes codes; arguments as `freeze_weights`."""
    quantizer: Any = own.activations
    layout = KernelLayout((0,))  # of one axis: there is one scale for all
    thresholds, steps, decodings = [], [], []
    for (of_one,) in _unstack(own.layer.stack, (parameters,)):
        decodings.append(_decoding(quantizer, of_one, None, layout, (1,)))
        lower, upper = quantizer.lower, quantizer.upper

        def encode(x, of_one=of_one):
            return np.asarray(quantizer.encode(of_one, jnp.asarray(x)))

        found = find_thresholds(encode, lower, upper)
        thresholds.append(found[0])
        steps.append(_inverse_step(quantizer, of_one, found))
    has_steps = all(step is not None for step in steps)
    by_steps = has_steps and quantizer.bits > BITS_BY_THRESHOLDS
    return Inputs(
        _stack_decodings(decodings, own.layer.stack, 0),
        quantizer.upper,
        None if by_steps else _stacked(thresholds, own.layer.stack),
        _stacked(steps, own.layer.stack) if has_steps else None,
    )


def _inverse_step(quantizer: Quantizer, parameters: Any, thresholds: np.ndarray) -> np.ndarray | None:
    """1 / step, if clip(round(x / step)) has the same thresholds as the quantizer; else None."""
    if not isinstance(quantizer, UniformQuantizer):
        return None
    inverse = np.float32(1) / np.asarray(quantizer.grid(parameters)[0], np.float32)

    def encode(x):
        with np.errstate(invalid='ignore', over='ignore'):
            return np.clip(np.round(x * inverse), quantizer.lower, quantizer.upper)

    same = np.array_equal(find_thresholds(encode, quantizer.lower, quantizer.upper), thresholds, equal_nan=True)
    return inverse if same else None


def _decoding(quantizer: Any, prepared: Any, factor: Any, layout: KernelLayout, shape: tuple[int, ...]) -> Decoding:
    """How codes of one tensor stand for values; by a table of levels where (code + shift) · scale is not the same."""
    codes = np.arange(quantizer.lower, quantizer.upper + 1)
    channels = [shape[axis] for axis in layout.permutation[len(shape) - layout.outputs :]]
    per_channel = quantizer.channel_axis is not None
    # All codes, one after another, in a tensor with all output channels, as the quantizer sees it.
    ndim = 2 if layout.is_matrix else len(shape)
    given = codes.reshape(-1, *(1,) * (ndim - 1))
    if per_channel:
        given = np.repeat(given, math.prod(channels), axis=-1)
    table = np.asarray(quantizer.decode(prepared, jnp.asarray(given, code_dtype(quantizer.lower))))
    if factor is not None:
        table = table * np.asarray(factor, np.float32)
    table = table.reshape(len(codes), -1)  # (codes, channels)

    def place(values):
        """Values, () or one for each channel, to broadcast against the kernel."""
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
    """The trees of every layer of a stack, whose axes come first."""
    depth, count = len(stack), math.prod(stack)
    flat = jax.tree.map(lambda x: jnp.asarray(x).reshape(count, *x.shape[depth:]), trees)
    return [jax.tree.map(lambda x: x[number], flat) for number in range(count)]  # noqa: B023


def _stacked(arrays: Any, stack: tuple[int, ...]) -> np.ndarray:
    whole = np.stack([np.asarray(x) for x in arrays])
    return whole.reshape((*stack, *whole.shape[1:]))


def _stack_decodings(decodings: list[Decoding], stack: tuple[int, ...], ndim: int) -> Decoding:
    """One decoding of a stack whose layers' codes have `ndim` axes; factors that are 1 throughout are left out."""

    def whole(arrays):
        # A single number for each layer gets the axes along which it is to broadcast.
        return _stacked([x.reshape(x.shape or (1,) * ndim) for x in arrays], stack) if stack else arrays[0]

    first = decodings[0]
    if any(one.levels is None for one in decodings):
        if any(one.levels is not None for one in decodings):
            raise ValueError('Some layers of a stack have equidistant values and others have not.')
        turns = zip(*(one.scales for one in decodings), strict=True)
        scales = tuple(whole(turn) for turn in turns if not all(np.all(x == 1) for x in turn))
        return dataclasses.replace(first, shift=whole([one.shift for one in decodings]), scales=scales)
    if not stack:
        return first
    tables: Any = [one.levels for one in decodings]
    tables = [x.reshape(x.shape if x.ndim > 1 else (*(1,) * ndim, -1)) for x in tables]
    return dataclasses.replace(first, levels=_stacked(tables, stack))


def _check_finite(frozen: Frozen) -> None:
    for path, x in frozen.floats.items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise ValueError(f'The parameter {path} holds NaN or infinity: there is nothing to export.')
