"""Quantizes a Flax Linen network without changing its layers.

A pure function from parameter tree to parameter tree fake-quantizes the weights. `flax.linen.intercept_methods`
fake-quantizes the input of a layer when the layer is called. The low-precision network thus shares code, parameter
names and full-precision weights with the full-precision network.

The parameters of an input quantizer travel in the parameter tree, next to the layer's kernel: `nn.scan` and `nn.remat`
pass them to the layer together with the kernel.
"""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from bqat_jax.interception import without_modules
from bqat_jax.quantizers import Quantizer
from bqat_jax.quantizers.oscillations import Tracker, hold
from bqat_jax.quantizers.rounding import EVALUATION, Context, Estimator
from bqat_jax.transform.layers import WEIGHT_NAME, Layer, intercept_layers
from bqat_jax.transform.rules import LayerSettings

ROLES = ('weights', 'activations')
# Name of the input quantizer's entry in the parameter tree, next to the layer's kernel.
INPUT_SLOT = 'input_quantizer'


@dataclasses.dataclass(frozen=True)
class LayerQuantizers:
    """The quantizers of one layer, or of a stack of layers with separate parameters.

    Attributes:
        weights: quantizer of the kernel; None for full precision.
        activations: quantizer of the input; None for full precision.
        layer: the layer; the axes of its stack are the leading axes of the quantizers' parameters.
        rescale: 'none', 'constant' or 'stddev'; see `rescale`.
    """

    weights: Quantizer | None
    activations: Quantizer | None
    layer: Layer
    rescale: str = 'none'

    def init_weights(self, kernel: jax.Array) -> dict[str, jax.Array]:
        """Returns initial parameters of the weights' quantizer."""
        quantizer: Any = self.weights
        return self.over_stack(lambda kernel: quantizer.init(self.layer.layout.to_channels_last(kernel)))(kernel)

    def quantize_weights(
        self, parameters: Any, kernel: jax.Array, context: Context = EVALUATION, tracker: Tracker | None = None
    ) -> jax.Array:
        """Returns the kernel fake-quantized and rescaled, in the layer's layout.

        Args:
            parameters: parameters of the weights' quantizer.
            kernel: the full-precision kernel.
            context: context of the quantizer.
            tracker: the kernel's tracker, if some of its weights may be frozen.
        """
        quantizer: Any = self.weights

        def quantize(parameters, kernel, context):
            weights = self.layer.layout.to_channels_last(kernel)
            quantized = quantizer.fake_quantize(parameters, weights, _from_slot(context))
            if tracker is not None:
                quantized = hold(quantizer, quantizer.prepare(parameters, weights), tracker, quantized)
            return self.layer.layout.from_channels_last(rescale(self.rescale, weights, quantized), kernel.shape)

        return self.over_stack(quantize)(parameters, kernel, self.slot(context))

    def slot(self, context: Context) -> dict[str, Any]:
        """Returns a context as arrays with the stack's leading axes, with separate random keys along them."""
        slot = {'progress': jnp.broadcast_to(jnp.asarray(context.progress, jnp.float32), self.layer.stack)}
        if context.key is not None:
            slot['key'] = jax.random.split(context.key, self.layer.stack) if self.layer.stack else context.key
        if context.strengths is not None:
            slot['strengths'] = jnp.broadcast_to(context.strengths, self.layer.stack)
        return slot

    def over_stack(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function vmapped over the stack's leading axes of all its arguments."""
        for _ in self.layer.stack:
            function = jax.vmap(function)
        return function


def _from_slot(slot: Mapping[str, Any]) -> Context:
    return Context(slot['progress'], slot.get('key'), slot.get('strengths'))


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The quantizers of a network, without their parameters.

    The parameters are a separate dict `{layer path: {'weights': {...}, 'activations': {...}}}` that omits what stays in
    full precision. An empty `layers` is full precision.

    Attributes:
        layers: quantizers by layer path.
    """

    layers: Mapping[str, LayerQuantizers]

    def quantize_params(self, parameters: Mapping[str, Any], params: Any, context: Context = EVALUATION) -> Any:
        """Returns the network's parameter tree with its weights fake-quantized, for use within `quantize_inputs`.

        Args:
            parameters: parameters of the quantizers.
            params: the network's complete 'params' collection.
            context: context of the network: its key is folded with every layer's path; its strengths are a dict like
                `parameters`, with a scalar for each quantizer whose estimator needs one; its trackers are by layer.

        Returns:
            The tree, with the parameters of the input quantizers next to the kernels.
        """
        flat: Any = traverse_util.flatten_dict(params, sep='/')
        for path, layer in self.layers.items():
            if layer.weights is not None:
                name, where = self.weight_path(path), context_of(context, path, 'weights', layer.weights)
                tracker = (context.trackers or {}).get(path)
                flat[name] = layer.quantize_weights(parameters[path]['weights'], flat[name], where, tracker)
            if layer.activations is not None:
                where = context_of(context, path, 'activations', layer.activations)
                flat[f'{path}/{INPUT_SLOT}'] = {'parameters': parameters[path]['activations'], **layer.slot(where)}
        return traverse_util.unflatten_dict(flat, sep='/')

    def weight_path(self, path: str) -> str:
        """Returns the path of a layer's kernel in the parameter tree; Linen's default name if it has no quantizers."""
        return f'{path}/{self.layers[path].layer.weight if path in self.layers else WEIGHT_NAME}'

    def quantize_inputs(
        self, look: Callable[[str, jax.Array], None] | None = None
    ) -> contextlib.AbstractContextManager:
        """Returns a context in which the input of every layer with an input quantizer is fake-quantized.

        The network must run with parameters from `quantize_params`.

        Args:
            look: is called with the path of every such layer and the codes of its input.
        """

        def quantize(call, module, path, x, args, kwargs):
            layer = self.layers.get(path)
            if layer is None or layer.activations is None:
                return call(x)
            slot = module.get_variable('params', INPUT_SLOT)
            if slot is None:
                raise ValueError(
                    f'The layer {path} has a quantizer for its input but no parameters for it. Run the network with '
                    'the parameters that `quantize_params` returns.'
                )
            with without_modules():
                quantized = layer.activations.fake_quantize(slot['parameters'], x, _from_slot(slot))
            if look is not None:
                look(path, layer.activations.encode(slot['parameters'], x))
            return call(quantized)

        return intercept_layers(quantize, self._key if look is None else None)

    @functools.cached_property
    def _key(self) -> object:
        """A key per instance: instances must not share traced programs."""
        return object()

    def quantizers(self) -> Iterable[tuple[str, str, Quantizer]]:
        """Yields (layer path, role, quantizer) for every quantizer."""
        for path, layer in self.layers.items():
            for role in ROLES:
                if getattr(layer, role) is not None:
                    yield path, role, getattr(layer, role)

    def constrain(self, new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `new`, the quantizer parameters after an optimizer step from `old`, with scales kept positive."""
        return {
            path: {
                role: getattr(self.layers[path], role).constrain(new_parameters, old[path][role])
                for role, new_parameters in roles.items()
            }
            for path, roles in new.items()
        }

    def bits(self, role: str) -> tuple[int, ...]:
        """Returns the number of bits of each quantized layer for role 'weights' or 'activations'."""
        quantizers = [getattr(layer, role) for layer in self.layers.values()]
        return tuple(quantizer.bits for quantizer in quantizers if quantizer is not None)


FULL_PRECISION = Quantization({})


def context_of(context: Context, path: str, role: str, quantizer: Quantizer) -> Context:
    """Returns the context of one quantizer, with its random key and strength; see `quantize_params`."""
    estimator, key, strengths = quantizer.estimator, None, None
    # An estimator with the default `round` needs no key.
    if context.key is not None and type(estimator).round is not Estimator.round:
        key = jax.random.fold_in(context.key, zlib.crc32(f'{path}/{role}'.encode()))
    if context.strengths is not None and estimator.needs_strength:
        strengths = context.strengths[path][role]
    return context._replace(key=key, strengths=strengths, trackers=None)


def rescale(how: str, weights: jax.Array, quantized: jax.Array) -> jax.Array:
    """Returns quantized weights rescaled to a scale that suits training (SAT; Jin et al., arXiv 1912.10207).

        'constant': w_q / (sqrt(n_out · k²) · std(w_q)), the scale of a fresh initialisation
        'stddev':   w_q · std(w) / std(w_q), the scale of the unquantized weights

    Standard deviations have no gradient. Rescaling matters for layers without a batch norm after them.

    Args:
        how: 'none', 'constant' or 'stddev'.
        weights: the unquantized weights, output channels last.
        quantized: the quantized weights; constant ones are returned unchanged.
    """
    if how == 'none':
        return quantized
    return (quantized.astype(jnp.float32) * rescale_factor(how, weights, quantized)).astype(quantized.dtype)


def rescale_factor(how: str, weights: jax.Array, quantized: jax.Array) -> jax.Array:
    """Returns the factor of `rescale`, float32 (), for 'constant' or 'stddev'."""
    spread = jnp.std(jax.lax.stop_gradient(quantized).astype(jnp.float32))
    if how == 'constant':
        target = jnp.float32((weights.size // weights.shape[-2]) ** -0.5)
    else:
        target = jnp.std(jax.lax.stop_gradient(weights).astype(jnp.float32))
    return jnp.where(spread > 0, target / jnp.where(spread > 0, spread, 1.0), 1.0)


def build_quantization(
    layers: Mapping[str, Layer], settings: Mapping[str, LayerSettings], signed_inputs: Mapping[str, bool]
) -> Quantization:
    """Returns the quantizers that the settings describe.

    Args:
        layers: layers from `find_layers`.
        settings: the layers' settings.
        signed_inputs: for every layer with a quantized input, whether its quantizer is signed.

    Raises:
        ValueError: if a layer does not support its quantizer; the message names the layer.
    """
    quantizers = {}
    for path, layer in settings.items():
        weights = activations = None
        try:
            if layer.weights is not None:
                weights = layer.weights.make(of_weights=True, signed=True)
            if layer.activations is not None:
                activations = layer.activations.make(of_weights=False, signed=signed_inputs[path])
            for quantizer in (weights, activations):
                if quantizer is not None and quantizer.estimator.needs_strength and layers[path].stack:
                    raise ValueError(
                        f'the estimator {quantizer.estimator.name!r} measures its strength for single layers, and '
                        'these are stacked.'
                    )
        except ValueError as error:
            raise ValueError(f'Layer {path}: {error} Use another quantizer here by a rule in quant.rules.') from error
        if weights is not None or activations is not None:
            scaling = layer.weights.rescale if layer.weights is not None else 'none'
            quantizers[path] = LayerQuantizers(weights, activations, layers[path], scaling)
    return Quantization(quantizers)
