"""Freezes a trained network: quantizers become codes, thresholds and scales; batch norms become affine."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bqat_jax.blocks.block_network import BATCH_STATS, PASSING, BlockNetwork, describe_inputs
from bqat_jax.export.fitting import check_network
from bqat_jax.export.frozen import (
    BETWEEN,
    EXACT_IN_FLOAT32,
    EXACT_IN_INT32,
    INTEGER,
    LOOKUP,
    Frozen,
    FrozenLayer,
    Inputs,
    Normalization,
    Weights,
    carried,
    carried_step,
)
from bqat_jax.export.inference import Program, arrays_of, is_batch_norm
from bqat_jax.export.tensors import freeze_inputs, freeze_weights
from bqat_jax.export.trying import find_wrong
from bqat_jax.interception import intercept_methods
from bqat_jax.replacement.paths import Variables
from bqat_jax.transform import Quantization
from bqat_jax.transform.layers import intercept_layers, layer_class
from bqat_jax.transform.quantization import LayerQuantizers

# Layers whose output is linear in their input and in their kernel, up to a bias called 'bias'.
LINEAR = (nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Dense, nn.DenseGeneral, nn.Einsum)


@dataclasses.dataclass(frozen=True)
class _Norm:
    """The settings of a batch norm."""

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
        network: the trained network, such as `BlockReplacement.network`.
        quantization: its quantizers, `BlockReplacement.quantization`.
        variables: the trained arrays, of one network: `Variables(params, quantizers, collections)`.
        normalization: if set, exported programs take stored images and normalize them.
        inputs: shape and dtype of a stored image, `jax.ShapeDtypeStruct((height, width, channels), jnp.uint8)`, or a
            shape for float32 from 0 to 1. The network's inputs if None.
        description: {'name', 'options', 'num_classes', 'cut'} of a registered network, from which `load` rebuilds it;
            None for a module of your own.

    Raises:
        TypeError: if `network` is not a `BlockNetwork`.
        ValueError: for a layer whose sums do not fit 32 bits, arrays that are not finite, or, with a normalization,
            inputs that are not images.
    """
    check_network(network)
    variables = jax.device_get(variables)
    linear, norms = _look_at_layers(network, variables)
    flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
    layers = {
        path: freeze_layer(path, own, quantization.weight_path(path), flat, variables.quantizers.get(path, {}))
        for path, own in quantization.layers.items()
    }
    integer = {path for path in linear & layers.keys() if layers[path].rescale is not None}

    def assemble(integer, norms):
        return Frozen(
            layers={
                path: dataclasses.replace(x, mode=INTEGER if path in integer else LOOKUP) for path, x in layers.items()
            },
            **_of_rest(variables, layers, norms),
            inputs=network.inputs if inputs is None else describe_inputs(inputs),
            normalization=normalization,
            network=description,
        )

    frozen = assemble(integer, norms)
    _check_normalization(frozen)
    _check_finite(frozen)
    # A module may use a layer's parameters in any way, so every layer is tried.
    wrong_layers, wrong_norms = find_wrong(frozen, network, variables)
    kept = {path: norm for path, norm in norms.items() if path not in wrong_norms}
    frozen = assemble(integer - wrong_layers, kept)
    problem = _why_it_does_not_run(frozen, network)
    if problem and kept:  # the network may read the statistics outside of batch norms
        frozen = assemble(integer - wrong_layers, {})
        problem = _why_it_does_not_run(frozen, network)
    if problem:
        raise ValueError(f'The network does not run on frozen arrays: {problem}')
    return frozen


def _why_it_does_not_run(frozen: Frozen, network: BlockNetwork) -> str:
    """The error of a frozen network run on shapes; '' for none."""
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), frozen.inputs)
    try:
        jax.eval_shape(Program(frozen, network).run, arrays_of(frozen), inputs)
    except Exception as error:
        return f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
    return ''


def _of_rest(variables: Variables, layers: Mapping[str, FrozenLayer], norms: Mapping[str, _Norm]) -> dict[str, Any]:
    """Everything but quantized kernels: batch norms, other parameters, other collections."""
    flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
    stats: Any = traverse_util.flatten_dict(variables.collections.get(BATCH_STATS, {}), sep='/')
    taken = {layer.weight for layer in layers.values() if layer.weights is not None}
    taken |= {f'{path}/{name}' for path in norms for name in ('scale', 'bias')}
    read = {f'{path}/{name}'.replace('/', BETWEEN) for path in norms for name in ('mean', 'var')}
    collections = {}
    for name, tree in variables.collections.items():
        own: Any = traverse_util.flatten_dict(tree, sep=BETWEEN) if name not in PASSING else {}
        own = {path: np.asarray(x) for path, x in own.items() if name != BATCH_STATS or path not in read}
        collections |= {name: own} if own else {}
    return {
        'norms': {path: _freeze_norm(path, norm, flat, stats) for path, norm in norms.items()},
        'floats': {path: np.asarray(x) for path, x in flat.items() if path not in taken},
        'collections': collections,
    }


def _look_at_layers(network: BlockNetwork, variables: Variables) -> tuple[set[str], dict[str, _Norm]]:
    """Finds, by a run on shapes, the layers that may multiply codes and the batch norms that may be affine."""
    linear: dict[str, bool] = {}
    norms: dict[str, _Norm | None] = {}
    params: Any = traverse_util.flatten_dict(variables.params, sep='/')
    stats: Any = traverse_util.flatten_dict(variables.collections.get(BATCH_STATS, {}), sep='/')

    def look(call, module, path, x, args, kwargs):
        y = call(x)
        is_known = layer_class(module) in LINEAR and x.dtype == jnp.float32
        linear[path] = is_known and y.dtype == jnp.float32 and linear.get(path, True)
        return y

    def look_at_norm(call, args, kwargs, context):
        module = context.module
        if is_batch_norm(context):
            path, x = '/'.join(module.path), args[0] if args else kwargs['x']
            norm = _Norm(module.epsilon, module.use_scale, module.use_bias)
            names = [f'{path}/{name}' for name, used in (('scale', norm.use_scale), ('bias', norm.use_bias)) if used]
            shapes = {np.shape(params[name]) for name in names} | {
                np.shape(stats[f'{path}/{k}']) for k in ('mean', 'var')
            }
            fits = module.axis in (-1, (-1,), x.ndim - 1) and norms.get(path, norm) == norm and len(shapes) == 1
            norms[path] = norm if fits else None
        return call(*args, **kwargs)

    def run(variables, inputs):
        return network.apply(variables, inputs, train=False)[0]

    with intercept_methods(look_at_norm), intercept_layers(look):
        jax.eval_shape(run, variables.of_network, network.batch_of(1))
    return {path for path, holds in linear.items() if holds}, {k: x for k, x in norms.items() if x is not None}


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
    path: str, own: LayerQuantizers, weight: str, params: Mapping[str, Any], parameters: Any
) -> FrozenLayer:
    """Returns a frozen quantized layer, with the scale of sums of codes if its codes can be multiplied.

    Args:
        path: path of the layer, for messages.
        own: its quantizers.
        weight: path of its kernel.
        params: parameters of the network by path.
        parameters: parameters of its quantizers by role.

    Raises:
        ValueError: if sums of its codes do not fit 32 bits, or its codes do not decode to the fake-quantized kernel.
    """
    weights = inputs = None
    try:
        if own.weights is not None:
            weights = freeze_weights(own, parameters['weights'], params[weight])
        if own.activations is not None:
            inputs = freeze_inputs(own, parameters['activations'])
    except ValueError as error:
        raise ValueError(f'The layer {path}: {error}') from error
    layer = FrozenLayer(own.layer.kind, weight, LOOKUP, weights, inputs)
    if weights is None or inputs is None:
        return layer
    if not (weights.decoding.carries_whole_numbers and inputs.decoding.is_uniform):
        return layer
    return _as_integer(path, layer, own, weights, inputs)


def _as_integer(path: str, layer: FrozenLayer, own: LayerQuantizers, weights: Weights, inputs: Inputs) -> FrozenLayer:
    """The layer as an integer layer, with the scale and a bound of its sums."""
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
            f'The layer {path}: sums of its codes may reach {largest}, which 32 bits do not hold. Use fewer bits, '
            'or leave it in full precision.'
        )
    scale = weights.decoding.scale * carried_step(weights.decoding)
    if scale.ndim:  # keeps the axes of output channels, in the kernel's order
        scale = scale.reshape([size for axis, size in enumerate(scale.shape) if axis not in summed])
        if all(size == 1 for size in scale.shape[depth:]):
            scale = scale.reshape(scale.shape[:depth])
    of_inputs = inputs.decoding.scale * carried_step(inputs.decoding)
    of_inputs = of_inputs.reshape(of_inputs.shape + (1,) * (scale.ndim - of_inputs.ndim))
    return dataclasses.replace(
        layer,
        rescale=(scale * of_inputs).astype(np.float32),
        largest_sum=largest,
        largest_kernel_sum=max(kernel_sum, 1),
    )


def _check_normalization(frozen: Frozen) -> None:
    """Checks that the inputs are images with the normalization's number of channels."""
    normalization, inputs = frozen.normalization, frozen.inputs
    if normalization is None:
        return
    channels = (len(normalization.mean), len(normalization.std))
    is_image = isinstance(inputs, jax.ShapeDtypeStruct) and inputs.dtype in (jnp.uint8, jnp.float32)
    if not is_image or channels != (inputs.shape[-1],) * 2:
        raise ValueError(
            f'normalization={normalization}: it needs images, uint8 or float32 (.., {channels[0]}), and the inputs '
            f'are {inputs}.'
        )


def _check_finite(frozen: Frozen) -> None:
    for path, x in frozen.floats.items():
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise ValueError(f'The parameter {path} holds NaN or infinity and cannot be exported.')
