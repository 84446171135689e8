"""`prepare`: quantizers with initial scales for a full-precision network, in one call."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from bqat_jax.transform.calibration import calibrate, find_signed_inputs
from bqat_jax.transform.layers import Layer, Layers, find_layers
from bqat_jax.transform.operations import unquantized_share
from bqat_jax.transform.quantization import Quantization, build_quantization
from bqat_jax.transform.rules import LayerSettings, assign_quantizers

# Share of the multiply-accumulates with weights.
ALLOW_UNQUANTIZED = 0.1


class Prepared(NamedTuple):
    """A network's quantizers.

    Attributes:
        quantization: the static part.
        quantizers: initial parameters, {layer path: {role: {name: array}}}.
    """

    quantization: Quantization
    quantizers: dict[str, Any]


def prepare(
    run: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    weights: Mapping[str, Any],
    activations: Mapping[str, Any],
    rules: Sequence[Mapping[str, Any]] = (),
    allow_unquantized: float = ALLOW_UNQUANTIZED,
) -> Prepared:
    """Finds a network's layers, assigns quantizers to them and calibrates the quantizers.

    Args:
        run: `run(params, batch)` runs the full-precision network in training mode.
        params: its 'params' collection.
        batches: calibration data: a list or an iterator of at least one batch of inputs, with examples along the first
            axis.
        weights: settings of the weights' quantizers, the fields of `QuantizerSettings`, such as {'name': 'lsq',
            'bits': 2}.
        activations: settings of the quantizers of the layers' inputs.
        rules: settings for particular layers; see `bqat_jax.transform.rules`.
        allow_unquantized: largest allowed share of the multiply-accumulates with weights that are not quantized.

    Raises:
        ValueError: for settings or rules that do not exist or do not fit the network, without a batch, if weights or
            inputs are not finite, or if too large a share of the network is not quantized.
    """
    batches, params = _as_list(batches), nn.meta.unbox(params)
    network_layers = find_layers(run, params, batches[0])
    layers = network_layers.quantizable
    share = unquantized_share(run, network_layers.others, params, batches[0])
    check_unquantized(network_layers, share, allow_unquantized)
    return prepare_layers(run, params, batches, layers, assign_quantizers(tuple(layers), weights, activations, rules))


def prepare_layers(
    run: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    layers: Mapping[str, Layer],
    settings: Mapping[str, LayerSettings],
) -> Prepared:
    """Runs the second half of `prepare`, for known layers and settings.

    Args:
        run: see `prepare`.
        params: see `prepare`.
        batches: see `prepare`.
        layers: layers from `find_layers`.
        settings: settings from `assign_quantizers`.

    Raises:
        ValueError: see `prepare`.
    """
    batches = _as_list(batches)
    quantization = find_quantization(run, params, batches, layers, settings)
    return Prepared(quantization, calibrate(quantization, params, run, batches))


def find_quantization(
    run: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    layers: Mapping[str, Layer],
    settings: Mapping[str, LayerSettings],
) -> Quantization:
    """Returns the static part of `prepare_layers`: the quantizers with the signs of their inputs, not calibrated.

    Args:
        run: see `prepare`.
        params: see `prepare`.
        batches: see `prepare`.
        layers: layers from `find_layers`.
        settings: settings from `assign_quantizers`.

    Raises:
        ValueError: see `prepare`.
    """
    batches, settings = _as_list(batches), fit_settings(layers, settings)
    return build_quantization(layers, settings, find_signed_inputs(run, params, batches, layers, settings))


def fit_settings(layers: Mapping[str, Layer], settings: Mapping[str, LayerSettings]) -> dict[str, LayerSettings]:
    """Returns the settings without those of inputs that cannot be quantized, such as the integers of an embedding."""
    return {
        path: own if layers[path].has_input else dataclasses.replace(own, activations=None)
        for path, own in settings.items()
    }


def check_unquantized(layers: Layers, share: float, allowed: float) -> None:
    """Checks that a large enough share of a network is quantized.

    Args:
        layers: the result of `find_layers`.
        share: the result of `unquantized_share`.
        allowed: the largest allowed share.

    Raises:
        ValueError: if the share is too large; the message names the weights that are not quantized.
    """
    if share > allowed:
        listed = '; '.join(f'{path}: {reason}' for path, reason in layers.others.items())
        raise ValueError(
            f'No quantizer reaches {share:.0%} of the multiply-accumulates with weights, and allow_unquantized='
            f'{allowed:g} ({listed}). Register the layers with register_layer, or increase allow_unquantized.'
        )


def _as_list(batches: Iterable[Any]) -> list[Any]:
    """Returns the batches as a list, to be read more than once."""
    if hasattr(batches, 'shape') or isinstance(batches, Mapping):
        raise ValueError('batches is a single batch: must be a list. Give [batch].')
    batches = list(batches)
    if not batches:
        raise ValueError('Calibration needs at least one batch.')
    return batches
