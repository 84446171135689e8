"""Quantizes a Flax Linen network from outside, without a change to its layers.

Weights go through a pure function from parameter tree to parameter tree. The input of a layer is fake-quantized as it
enters the layer, by `flax.linen.intercept_methods`. So the low-precision network shares its code, its parameter names
and its full-precision weights with the full-precision one.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from bqat_jax.quantization.quantizers import LSQ, get_quantizer
from bqat_jax.quantization.rounding import get_estimator
from bqat_jax.quantization.rules import LayerSettings

# The layers whose weights and input can be quantized; their weight is called 'kernel', output channels last.
LAYER_TYPES = (nn.Conv, nn.Dense)
WEIGHT_NAME = 'kernel'
OUTPUT_CHANNEL_AXIS = -1


@dataclasses.dataclass(frozen=True)
class LayerQuantizers:
    """The quantizers of one layer; None where it stays in full precision."""

    weights: LSQ | None
    activations: LSQ | None


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a network is quantized: the static half, beside the parameters of the quantizers.

    The parameters are a dict `{layer path: {'weights': {...}, 'activations': {...}}}` without the entries that stay
    in full precision. An empty `layers` is full precision.

    Attributes:
        layers: layer path to its quantizers.
    """

    layers: Mapping[str, LayerQuantizers]

    def quantize_params(self, parameters: Mapping[str, Any], params: Any) -> Any:
        """Returns the network's parameter tree with its weights fake-quantized.

        Args:
            parameters: parameters of the quantizers.
            params: the network's 'params' collection, whole.
        """
        flat: Any = traverse_util.flatten_dict(params, sep='/')
        for path, quantizers in self.layers.items():
            if quantizers.weights is not None:
                name = f'{path}/{WEIGHT_NAME}'
                flat[name] = quantizers.weights.fake_quantize(parameters[path]['weights'], flat[name])
        return traverse_util.unflatten_dict(flat, sep='/')

    def quantize_inputs(self, parameters: Mapping[str, Any]) -> contextlib.AbstractContextManager:
        """Returns a context in which the input of every layer that has a quantizer for it is fake-quantized."""

        def quantize(path: str, x: jax.Array) -> jax.Array:
            quantizers = self.layers.get(path)
            if quantizers is None or quantizers.activations is None:
                return x
            return quantizers.activations.fake_quantize(parameters[path]['activations'], x)

        return _map_inputs(quantize)

    def constrain(self, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `new`, quantizer parameters after an optimizer step from `old`, with every scale kept positive."""
        return {
            path: {
                role: getattr(self.layers[path], role).constrain(new_parameters, old[path][role])
                for role, new_parameters in roles.items()
            }
            for path, roles in new.items()
        }

    def bits(self, role: str) -> tuple[int, ...]:
        """The number of bits of each quantized layer, for role 'weights' or 'activations'."""
        quantizers = [getattr(layer, role) for layer in self.layers.values()]
        return tuple(quantizer.bits for quantizer in quantizers if quantizer is not None)


FULL_PRECISION = Quantization({})


def _map_inputs(function: Callable[[str, jax.Array], jax.Array]) -> contextlib.AbstractContextManager:
    """A context in which `function(path, x)` replaces the input x of every conv and dense layer."""

    def interceptor(call, args, kwargs, context):
        if isinstance(context.module, LAYER_TYPES) and context.method_name == '__call__':
            path = '/'.join(context.module.path)
            if args:
                args = (function(path, args[0]), *args[1:])
            else:
                kwargs = {**kwargs, 'inputs': function(path, kwargs['inputs'])}
        return call(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def find_layers(run: Callable[..., Any], *arguments: Any) -> tuple[str, ...]:
    """Returns the paths of the layers that can be quantized, in the order in which they run.

    Args:
        run: runs the network: `run(*arguments)`. Nothing is computed: shapes are enough.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    paths: dict[str, None] = {}

    def record(path, x):
        paths[path] = None
        return x

    with _map_inputs(record):
        # A function of our own: JAX does not trace one again that it has traced before, and then nothing is recorded.
        jax.eval_shape(lambda *arguments: run(*arguments), *arguments)
    return tuple(paths)


def find_signed_inputs(
    run: Callable[[Any], Any], batches: Iterable[Any], settings: Mapping[str, LayerSettings]
) -> dict[str, bool]:
    """Returns, for every layer whose input is quantized, whether it needs negative numbers.

    Settings that name the sign decide; for 'auto' the layer's input in full precision does.

    Args:
        run: `run(batch)` runs the full-precision network on one batch.
        batches: what to look at.
        settings: the layers' settings.
    """
    wanted = {path: layer.activations.sign for path, layer in settings.items() if layer.activations is not None}

    @jax.jit
    def minima(batch):
        seen = {}

        def record(path, x):
            if wanted.get(path) == 'auto':
                seen[path] = jnp.minimum(seen.get(path, jnp.inf), jnp.min(x).astype(jnp.float32))
            return x

        with _map_inputs(record):
            run(batch)
        return seen

    signed = {path: sign == 'signed' for path, sign in wanted.items()}
    if 'auto' in wanted.values():
        for batch in batches:
            for path, minimum in jax.device_get(minima(batch)).items():
                signed[path] = signed[path] or bool(minimum < 0)
    return signed


def build_quantization(settings: Mapping[str, LayerSettings], signed_inputs: Mapping[str, bool]) -> Quantization:
    """Returns the quantizers that the settings ask for.

    Args:
        settings: the layers' settings.
        signed_inputs: for every layer whose input is quantized, whether it needs negative numbers.
    """
    layers = {}
    for path, layer in settings.items():
        weights = activations = None
        if layer.weights is not None:
            weights = get_quantizer(layer.weights.name)(
                bits=layer.weights.bits,
                signed=True,
                channel_axis=OUTPUT_CHANNEL_AXIS if layer.weights.granularity == 'channel' else None,
                estimator=get_estimator(layer.weights.estimator),
            )
        if layer.activations is not None:
            activations = get_quantizer(layer.activations.name)(
                bits=layer.activations.bits,
                signed=signed_inputs[path],
                batch_axis=0,
                estimator=get_estimator(layer.activations.estimator),
            )
        if weights is not None or activations is not None:
            layers[path] = LayerQuantizers(weights, activations)
    return Quantization(layers)


def init_quantizers(
    quantization: Quantization, params: Any, run: Callable[[Any, Any], Any], batch: Any
) -> dict[str, Any]:
    """Returns initial parameters of all quantizers, from the weights and one batch; a pure function.

    The input of a layer is seen as it arrives in the low-precision network, behind layers whose weights and inputs are
    already quantized. A layer that runs more than once has one input quantizer, initialised from its first input.

    Args:
        quantization: the quantizers.
        params: the network's 'params' collection.
        run: `run(params, batch)` runs the network.
        batch: what it runs on.

    Raises:
        ValueError: if a layer that has a quantizer for its input does not run.
    """
    flat: Any = traverse_util.flatten_dict(params, sep='/')
    found: dict[str, Any] = {path: {} for path in quantization.layers}
    for path, quantizers in quantization.layers.items():
        if quantizers.weights is not None:
            found[path]['weights'] = quantizers.weights.init(flat[f'{path}/{WEIGHT_NAME}'])

    def init_and_quantize(path: str, x: jax.Array) -> jax.Array:
        quantizers = quantization.layers.get(path)
        if quantizers is None or quantizers.activations is None:
            return x
        if 'activations' not in found[path]:
            found[path]['activations'] = quantizers.activations.init(x)
        return quantizers.activations.fake_quantize(found[path]['activations'], x)

    with _map_inputs(init_and_quantize):
        run(quantization.quantize_params(found, params), batch)
    for path, quantizers in quantization.layers.items():
        if quantizers.activations is not None and 'activations' not in found[path]:
            raise ValueError(f'The layer {path} has a quantizer for its input, but did not run.')
    return found


def calibrate(
    quantization: Quantization, params: Any, run: Callable[[Any, Any], Any], batches: Iterable[Any]
) -> dict[str, Any]:
    """Returns initial parameters of all quantizers, the mean of `init_quantizers` over the batches.

    Raises:
        ValueError: without a batch.
    """
    init = jax.jit(lambda params, batch: init_quantizers(quantization, params, run, batch))
    found = [init(params, batch) for batch in batches]
    if not found:
        raise ValueError('Calibration needs at least one batch.')
    return jax.tree.map(lambda *values: sum(values[1:], values[0]) / len(values), *found)
