"""Initial parameters of all quantizers, from the weights and some batches of data.

A layer inside `nn.scan` or `nn.remat` cannot return values directly. Statistics of its input are therefore tagged there
and collected from the traced program; see `tagging`. No gradient is involved, so unused heads and layers before
`stop_gradient` or `argmax` are observed too.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bqat_jax.interception import without_modules
from bqat_jax.quantizers import Quantizer
from bqat_jax.transform.layers import Layer, intercept_layers
from bqat_jax.transform.quantization import Quantization
from bqat_jax.transform.rules import LayerSettings
from bqat_jax.transform.tagging import collect_tagged, tag

PLACE = 'input_place'


def observe_inputs(
    run: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    layers: Mapping[str, Layer],
    statistics: Mapping[str, Callable[[jax.Array], Any]],
    transforms: Mapping[str, Callable[[jax.Array], jax.Array]],
) -> dict[str, Any]:
    """Returns statistics of layers' inputs, averaged over each layer's calls; a pure function.

    Args:
        run: `run(params, batch)` runs the network.
        params: the network's 'params' collection.
        batch: a batch of inputs.
        layers: layers from `find_layers`.
        statistics: for every observed layer, a function from its input to a tree of float32 arrays.
        transforms: for some of these layers, a function that replaces the input by an array of equal shape.

    Returns:
        The statistics by layer; NaN for a layer whose branch of a conditional was never taken.

    Raises:
        ValueError: if one of the layers does not run.
    """
    names = list(statistics)

    def look(call, module, path, x, args, kwargs):
        if path not in statistics:
            return call(x)
        place = module.get_variable('params', PLACE)
        with without_modules():
            tag(names.index(path), (place, *jax.tree.leaves(statistics[path](x))))
            transformed = transforms.get(path, _pass)(x)
        return call(transformed)

    def watched(params, batch):
        flat: Any = traverse_util.flatten_dict(params, sep='/')
        for path in names:  # The index in its stack travels to a layer next to its kernel.
            stack = layers[path].stack
            flat[f'{path}/{PLACE}'] = jnp.arange(math.prod(stack)).reshape(stack)
        with intercept_layers(look):
            return run(traverse_util.unflatten_dict(flat, sep='/'), batch)

    observed = collect_tagged(watched, params, batch)
    for number, path in enumerate(names):
        if number not in observed:
            raise ValueError(f'The layer {path} has a quantizer for its input, but did not run.')
    return {path: _mean(observed[number], layers[path], statistics[path]) for number, path in enumerate(names)}


def _mean(calls: Sequence[Sequence[jax.Array]], layer: Layer, statistic: Callable[..., Any]) -> Any:
    """Returns the mean over calls for every index of a layer's stack."""
    shapes = jax.eval_shape(statistic, layer.input)
    leaves, structure = jax.tree.flatten(shapes)
    count = math.prod(layer.stack)
    total, number = [jnp.zeros((count, *x.shape), x.dtype) for x in leaves], jnp.zeros(count, jnp.float32)
    for place, *values in calls:
        # A branch that is not taken has place -1 and is dropped.
        at = jnp.where(place.ravel() < 0, count, place.ravel())
        number = number.at[at].add(1.0, mode='drop')
        total = [
            sums.at[at].add(value.reshape(-1, *x.shape), mode='drop')
            for sums, value, x in zip(total, values, leaves, strict=True)
        ]
    means = [
        (sums / number.reshape(-1, *(1,) * (sums.ndim - 1))).reshape(*layer.stack, *x.shape)
        for sums, x in zip(total, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, means)


def _pass(x: jax.Array) -> jax.Array:
    return x


def find_signed_inputs(
    run: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    layers: Mapping[str, Layer],
    settings: Mapping[str, LayerSettings],
) -> dict[str, bool]:
    """Returns for every layer with a quantized input whether its quantizer is signed.

    For the sign 'auto', the layer's input in full precision decides.

    Args:
        run: `run(params, batch)` runs the full-precision network on one batch.
        params: its 'params' collection.
        batches: batches of inputs.
        layers: layers from `find_layers`.
        settings: the layers' settings.
    """
    wanted = {path: layer.activations.sign for path, layer in settings.items() if layer.activations is not None}
    signed = {path: sign == 'signed' for path, sign in wanted.items()}
    unknown = [path for path, sign in wanted.items() if sign == 'auto']

    def is_negative(x):
        return jnp.any(x < 0).astype(jnp.float32)

    @jax.jit
    def look(params, batch):
        return observe_inputs(run, params, batch, layers, dict.fromkeys(unknown, is_negative), {})

    if unknown:
        for batch in batches:
            for path, negative in jax.device_get(look(params, batch)).items():
                signed[path] = signed[path] or bool((negative > 0).any())
    return signed


def init_quantizers(
    quantization: Quantization, params: Any, run: Callable[[Any, Any], Any], batch: Any
) -> dict[str, Any]:
    """Returns initial parameters of all quantizers, from the weights and one batch; a pure function.

    Input quantizers are initialized in the low-precision network, after layers whose weights and inputs are already
    quantized. A layer with several calls has one input quantizer, whose parameters are the mean over the calls.

    Args:
        quantization: the quantizers.
        params: the network's 'params' collection.
        run: `run(params, batch)` runs the network.
        batch: a batch of inputs.

    Raises:
        ValueError: if a layer with an input quantizer does not run.
    """
    flat: Any = traverse_util.flatten_dict(params, sep='/')
    initial: dict[str, Any] = {path: {} for path in quantization.layers}
    statistics, transforms = {}, {}
    for path, layer in quantization.layers.items():
        if layer.weights is not None:
            kernel = flat[quantization.weight_path(path)]
            initial[path]['weights'] = layer.init_weights(kernel)
            flat[quantization.weight_path(path)] = layer.quantize_weights(initial[path]['weights'], kernel)
        if layer.activations is not None:
            statistics[path] = layer.activations.init
            transforms[path] = functools.partial(_init_and_quantize, layer.activations)
    quantized = traverse_util.unflatten_dict(flat, sep='/')
    layers = {path: layer.layer for path, layer in quantization.layers.items()}
    for path, parameters in observe_inputs(run, quantized, batch, layers, statistics, transforms).items():
        initial[path]['activations'] = parameters
    return initial


def quantizer_shapes(quantization: Quantization, params: Any) -> dict[str, Any]:
    """Returns shapes and dtypes of the result of `init_quantizers`; the network is not traced.

    Args:
        quantization: the quantizers.
        params: the network's 'params' collection, arrays or shapes.
    """
    flat: Any = traverse_util.flatten_dict(params, sep='/')
    shapes: dict[str, Any] = {path: {} for path in quantization.layers}
    for path, layer in quantization.layers.items():
        if layer.weights is not None:
            kernel = flat[quantization.weight_path(path)]
            shapes[path]['weights'] = jax.eval_shape(layer.init_weights, kernel)
        if layer.activations is not None:
            of_one, stack = jax.eval_shape(layer.activations.init, layer.layer.input), layer.layer.stack
            shapes[path]['activations'] = jax.tree.map(
                lambda x, stack=stack: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), of_one
            )
    return shapes


def _init_and_quantize(quantizer: Quantizer, x: jax.Array) -> jax.Array:
    return quantizer.fake_quantize(quantizer.init(x), x)


@jax.jit
def mean_of_trees(trees: Sequence[Any]) -> Any:
    """Returns the leafwise mean of trees of equal structure."""
    return jax.tree.map(lambda *values: sum(values[1:], values[0]) / len(values), *trees)


def calibrate(
    quantization: Quantization, params: Any, run: Callable[[Any, Any], Any], batches: Iterable[Any]
) -> dict[str, Any]:
    """Returns initial parameters of all quantizers, the mean of `init_quantizers` over the batches.

    Raises:
        ValueError: without a batch, or if a layer's weights or input are not finite; the message names the layer.
    """
    init = jax.jit(lambda params, batch: init_quantizers(quantization, params, run, batch))
    # Block after each batch: with a long queue of programs, XLA's CPU devices can deadlock.
    of_batches = [jax.block_until_ready(init(params, batch)) for batch in batches]
    if not of_batches:
        raise ValueError('Calibration needs at least one batch.')
    mean = mean_of_trees(of_batches)
    for path, roles in jax.device_get(mean).items():
        for role, parameters in roles.items():
            if not all(np.isfinite(x).all() for x in parameters.values()):
                raise ValueError(
                    f'The {role} of layer {path} gave no finite scale: they contain NaN or infinity, or the layer is '
                    'in a branch that is not taken. Check the partner and the calibration data.'
                )
    return mean
