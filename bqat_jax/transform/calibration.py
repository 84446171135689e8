"""Initial parameters of all quantizers, from the weights and some batches of data.

A layer's input may be seen only inside `nn.scan` or `nn.remat`, from where nothing can be carried out by hand. So what
is to be known of it comes out as a gradient: a function that passes the input on has a backward rule by which a
placeholder in the parameter tree receives a statistic of that input for its gradient. Flax's 8-bit floating-point
layers keep their history of maxima in the same way (`flax.linen.fp8_ops`).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from bqat_jax.quantizers import Quantizer
from bqat_jax.transform.layers import WEIGHT_NAME, Layer, intercept_layers
from bqat_jax.transform.quantization import Quantization
from bqat_jax.transform.rules import LayerSettings

PROBE = 'input_probe'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observe(statistic: Callable[..., Any], transform: Callable[..., Any], x: jax.Array, probe: Any) -> jax.Array:
    """Returns transform(x); in the backward pass the probe's gradient is statistic(x), and the number of calls."""
    del statistic, probe
    return transform(x)


def _observe_forward(statistic, transform, x, probe):
    del statistic, probe
    return transform(x), x


def _observe_backward(statistic, transform, x, cotangent):
    del transform
    return cotangent, {'sum': statistic(x), 'calls': jnp.float32(1)}


_observe.defvjp(_observe_forward, _observe_backward)


def observe_inputs(
    run: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    layers: Mapping[str, Layer],
    statistics: Mapping[str, Callable[[jax.Array], Any]],
    transforms: Mapping[str, Callable[[jax.Array], jax.Array]],
) -> dict[str, Any]:
    """Returns statistics of layers' inputs, the mean over a layer's calls; a pure function.

    Args:
        run: `run(params, batch)` runs the network.
        params: the network's 'params' collection.
        batch: what it runs on.
        layers: what `find_layers` found.
        statistics: for every layer of interest a function of its input that gives a tree of float32 arrays.
        transforms: for some of them, what the layer gets instead of its input, in the same shape.

    Raises:
        ValueError: if one of the layers does not run.
    """
    seen = set()

    def look(call, module, path, x, args, kwargs):
        if path not in statistics:
            return call(x)
        seen.add(path)
        probe = module.get_variable('params', PROBE)
        return call(_observe(statistics[path], transforms.get(path, _pass), x, probe))

    def total(probes):
        flat: Any = traverse_util.flatten_dict(params, sep='/')
        flat |= {f'{path}/{PROBE}': probe for path, probe in probes.items()}
        with intercept_layers(look):
            outputs = run(traverse_util.unflatten_dict(flat, sep='/'), batch)
        floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((jnp.sum(x.astype(jnp.float32)) for x in floats), jnp.float32(0))

    def make_probe(path):
        value = jax.eval_shape(statistics[path], layers[path].input)
        stack = layers[path].stack
        return jax.tree.map(
            lambda x: jnp.zeros((*stack, *x.shape), x.dtype),
            {'sum': value, 'calls': jax.ShapeDtypeStruct((), jnp.float32)},
        )

    observed = jax.grad(total)({path: make_probe(path) for path in statistics})
    for path in statistics:
        if path not in seen:
            raise ValueError(f'The layer {path} has a quantizer for its input, but did not run.')

    def mean(probe):
        def divide(x):
            return x / probe['calls'].reshape(probe['calls'].shape + (1,) * (x.ndim - probe['calls'].ndim))

        return jax.tree.map(divide, probe['sum'])

    return {path: mean(probe) for path, probe in observed.items()}


def _pass(x: jax.Array) -> jax.Array:
    return x


def find_signed_inputs(
    run: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    layers: Mapping[str, Layer],
    settings: Mapping[str, LayerSettings],
) -> dict[str, bool]:
    """Returns, for every layer whose input is quantized, whether it needs negative numbers.

    Settings that name the sign decide; for 'auto' the layer's input in full precision does.

    Args:
        run: `run(params, batch)` runs the full-precision network on one batch.
        params: its 'params' collection.
        batches: what to look at.
        layers: what `find_layers` found.
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

    The input of a layer is seen as it arrives in the low-precision network, behind layers whose weights and inputs are
    already quantized. A layer that runs more than once has one input quantizer, the mean over its calls.

    Args:
        quantization: the quantizers.
        params: the network's 'params' collection.
        run: `run(params, batch)` runs the network.
        batch: what it runs on.

    Raises:
        ValueError: if a layer that has a quantizer for its input does not run.
    """
    flat: Any = traverse_util.flatten_dict(params, sep='/')
    initial: dict[str, Any] = {path: {} for path in quantization.layers}
    statistics, transforms = {}, {}
    for path, layer in quantization.layers.items():
        if layer.weights is not None:
            kernel = flat[f'{path}/{WEIGHT_NAME}']
            initial[path]['weights'] = layer.init_weights(kernel)
            flat[f'{path}/{WEIGHT_NAME}'] = layer.quantize_weights(initial[path]['weights'], kernel)
        if layer.activations is not None:
            statistics[path] = layer.activations.init
            transforms[path] = functools.partial(_init_and_quantize, layer.activations)
    quantized = traverse_util.unflatten_dict(flat, sep='/')
    layers = {path: layer.layer for path, layer in quantization.layers.items()}
    for path, parameters in observe_inputs(run, quantized, batch, layers, statistics, transforms).items():
        initial[path]['activations'] = parameters
    return initial


def _init_and_quantize(quantizer: Quantizer, x: jax.Array) -> jax.Array:
    return quantizer.fake_quantize(quantizer.init(x), x)


@jax.jit
def mean_of_trees(trees: Sequence[Any]) -> Any:
    """Returns the mean of trees of one structure, leaf by leaf."""
    return jax.tree.map(lambda *values: sum(values[1:], values[0]) / len(values), *trees)


def calibrate(
    quantization: Quantization, params: Any, run: Callable[[Any, Any], Any], batches: Iterable[Any]
) -> dict[str, Any]:
    """Returns initial parameters of all quantizers, the mean of `init_quantizers` over the batches.

    Raises:
        ValueError: without a batch, or if a layer's weights or input are not finite; the layer is named.
    """
    init = jax.jit(lambda params, batch: init_quantizers(quantization, params, run, batch))
    # One after another: XLA's CPU devices can block each other for ever behind a long queue of programs.
    of_batches = [jax.block_until_ready(init(params, batch)) for batch in batches]
    if not of_batches:
        raise ValueError('Calibration needs at least one batch.')
    mean = mean_of_trees(of_batches)
    for path, roles in jax.device_get(mean).items():
        for role, parameters in roles.items():
            if not all(jnp.all(jnp.isfinite(x)) for x in parameters.values()):
                raise ValueError(
                    f'The {role} of layer {path} gave no finite scale: there is a NaN or an infinite number in them. '
                    'Look at the partner and at the calibration images.'
                )
    return mean
