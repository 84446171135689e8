"""Quantizes a Flax Linen network from outside, without a change to its layers.

Weights go through a pure function from parameter tree to parameter tree. The input of a layer is fake-quantized as it
enters the layer, by `flax.linen.intercept_methods`. So the low-precision network shares its code, its parameter names
and its full-precision weights with the full-precision one.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from bqat_jax.quantization.quantizers import Quantizer
from bqat_jax.quantization.rounding import EVALUATION, Context, Estimator
from bqat_jax.quantization.rules import LayerSettings

# The layers whose weights and input can be quantized; their weight is called 'kernel', output channels last.
LAYER_TYPES = (nn.Conv, nn.Dense)
WEIGHT_NAME = 'kernel'
ROLES = ('weights', 'activations')


@dataclasses.dataclass(frozen=True)
class LayerQuantizers:
    """The quantizers of one layer; None where it stays in full precision. `rescale` names a way of `rescale`."""

    weights: Quantizer | None
    activations: Quantizer | None
    rescale: str = 'none'


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a network is quantized: the static half, beside the parameters of the quantizers.

    The parameters are a dict `{layer path: {'weights': {...}, 'activations': {...}}}` without the entries that stay
    in full precision. An empty `layers` is full precision.

    Attributes:
        layers: layer path to its quantizers.
    """

    layers: Mapping[str, LayerQuantizers]

    def quantize_params(self, parameters: Mapping[str, Any], params: Any, context: Context = EVALUATION) -> Any:
        """Returns the network's parameter tree with its weights fake-quantized.

        Args:
            parameters: parameters of the quantizers.
            params: the network's 'params' collection, whole.
            context: of the whole network: its key is folded with every layer's path, and its delta is a dict like
                `parameters` with a strength for each quantizer whose estimator needs one.
        """
        flat: Any = traverse_util.flatten_dict(params, sep='/')
        for path, quantizers in self.layers.items():
            quantizer = quantizers.weights
            if quantizer is not None:
                name = f'{path}/{WEIGHT_NAME}'
                where = context_of(context, path, 'weights', quantizer)
                quantized = quantizer.fake_quantize(parameters[path]['weights'], flat[name], where)
                flat[name] = rescale(quantizers.rescale, flat[name], quantized)
        return traverse_util.unflatten_dict(flat, sep='/')

    def quantize_inputs(
        self, parameters: Mapping[str, Any], context: Context = EVALUATION
    ) -> contextlib.AbstractContextManager:
        """Returns a context in which the input of every layer that has a quantizer for it is fake-quantized."""

        def quantize(path: str, x: jax.Array) -> jax.Array:
            quantizer = self.layers[path].activations if path in self.layers else None
            if quantizer is None:
                return x
            where = context_of(context, path, 'activations', quantizer)
            return quantizer.fake_quantize(parameters[path]['activations'], x, where)

        return _map_inputs(quantize)

    def quantizers(self) -> Iterable[tuple[str, str, Quantizer]]:
        """Yields (layer path, role, quantizer) for every quantizer."""
        for path, layer in self.layers.items():
            for role in ROLES:
                if getattr(layer, role) is not None:
                    yield path, role, getattr(layer, role)

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


def context_of(context: Context, path: str, role: str, quantizer: Quantizer) -> Context:
    """Returns the context of one quantizer, with randomness and a strength of its own; see `quantize_params`."""
    estimator, key, delta = quantizer.estimator, None, None
    # An estimator that rounds as all do draws nothing.
    if context.key is not None and type(estimator).round is not Estimator.round:
        key = jax.random.fold_in(context.key, zlib.crc32(f'{path}/{role}'.encode()))
    if context.delta is not None and estimator.needs_delta:
        delta = context.delta[path][role]
    return context._replace(key=key, delta=delta)


def rescale(how: str, weights: jax.Array, quantized: jax.Array) -> jax.Array:
    """Returns quantized weights scaled again, so that their size suits training (SAT; Jin et al., arXiv 1912.10207).

        'constant': w_q / (sqrt(n_out · k²) · std(w_q)), the size of a fresh initialisation
        'stddev':   w_q · std(w) / std(w_q), the size of the unquantized weights

    Standard deviations have no gradient. It matters where no batch norm follows.

    Args:
        how: 'none', 'constant' or 'stddev'.
        weights: the unquantized weights, output channels last.
        quantized: the quantized ones; what has no spread stays as it is.
    """
    if how == 'none':
        return quantized
    spread = jnp.std(jax.lax.stop_gradient(quantized).astype(jnp.float32))
    if how == 'constant':
        target = jnp.float32((weights.size // weights.shape[-2]) ** -0.5)
    else:
        target = jnp.std(jax.lax.stop_gradient(weights).astype(jnp.float32))
    factor = jnp.where(spread > 0, target / jnp.where(spread > 0, spread, 1.0), 1.0)
    return (quantized.astype(jnp.float32) * factor).astype(quantized.dtype)


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


def find_shapes(run: Callable[..., Any], variables: Any, x: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns {layer path: {'weights': shape, 'activations': shape of the input}} of the layers that can be quantized.

    Args:
        run: `run(variables, x)` runs the network. Nothing is computed.
        variables: its variables; arrays or shapes.
        x: its input; array or shape.
    """
    flat: Any = traverse_util.flatten_dict(variables['params'], sep='/')
    found = {}

    def record(path, x):
        found[path] = {'weights': flat[f'{path}/{WEIGHT_NAME}'].shape, 'activations': x.shape}
        return x

    with _map_inputs(record):
        jax.eval_shape(lambda variables, x: run(variables, x), variables, x)
    return found


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

    Raises:
        ValueError: if a layer's quantizer is not defined for it; the layer is named.
    """
    layers = {}
    for path, layer in settings.items():
        weights = activations = None
        try:
            if layer.weights is not None:
                weights = layer.weights.make(of_weights=True, signed=True)
            if layer.activations is not None:
                activations = layer.activations.make(of_weights=False, signed=signed_inputs[path])
        except ValueError as error:
            raise ValueError(f'Layer {path}: {error} A rule in quant.rules can give this layer another one.') from error
        if weights is not None or activations is not None:
            scaling = layer.weights.rescale if layer.weights is not None else 'none'
            layers[path] = LayerQuantizers(weights, activations, scaling)
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
        ValueError: without a batch, or if a layer's weights or input are not finite; the layer is named.
    """
    init = jax.jit(lambda params, batch: init_quantizers(quantization, params, run, batch))
    found = [init(params, batch) for batch in batches]
    if not found:
        raise ValueError('Calibration needs at least one batch.')
    mean = jax.tree.map(lambda *values: sum(values[1:], values[0]) / len(values), *found)
    for path, roles in mean.items():
        for role, parameters in roles.items():
            if not all(bool(jnp.all(jnp.isfinite(x))) for x in parameters.values()):
                raise ValueError(
                    f'The {role} of layer {path} gave no finite scale: there is a NaN or an infinite number in them. '
                    'Look at the partner and at the calibration images.'
                )
    return mean
