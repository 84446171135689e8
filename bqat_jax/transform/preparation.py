"""From a full-precision network to a quantized one with initial scales, in one call."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from bqat_jax.transform.calibration import calibrate, find_signed_inputs
from bqat_jax.transform.layers import Layer, Layers, find_layers
from bqat_jax.transform.operations import unquantized_share
from bqat_jax.transform.quantization import Quantization, build_quantization
from bqat_jax.transform.rules import LayerSettings, assign_quantizers

# Of the multiply-accumulates with weights.
ALLOW_UNQUANTIZED = 0.1


class Prepared(NamedTuple):
    """A network's quantizers.

    Attributes:
        quantization: the static half.
        quantizers: their initial parameters, {layer path: {role: {name: array}}}.
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
    """Finds a network's layers, assigns quantizers to them, looks at the signs of their inputs, builds and calibrates.

    Args:
        run: `run(params, batch)` runs the full-precision network, as in training.
        params: its 'params' collection.
        batches: what to calibrate on, as the network takes it: a list or an iterator of at least one batch, with
            examples along the first axis.
        weights: settings of the weights' quantizers, the fields of `QuantizerSettings`, such as {'name': 'lsq',
            'bits': 2}.
        activations: settings of the quantizers of the layers' inputs.
        rules: which layers differ; see `bqat_jax.transform.rules`.
        allow_unquantized: largest share of the multiply-accumulates with weights whose weights no quantizer reaches.

    Raises:
        ValueError: for settings or rules that do not exist or do not fit the network, without a batch, if weights or
            inputs are not finite, or if no quantizer reaches too large a share of the network.
    """
    batches, params = _as_list(batches), nn.meta.unbox(params)
    found = find_layers(run, params, batches[0])
    layers = found.quantizable
    check_unquantized(found, unquantized_share(run, found.others, params, batches[0]), allow_unquantized)
    return prepare_layers(run, params, batches, layers, assign_quantizers(tuple(layers), weights, activations, rules))


def prepare_layers(
    run: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    layers: Mapping[str, Layer],
    settings: Mapping[str, LayerSettings],
) -> Prepared:
    """The second half of `prepare`, for layers that were found and settings that were assigned before.

    Args:
        run: see `prepare`.
        params: see `prepare`.
        batches: see `prepare`.
        layers: what `find_layers` found.
        settings: what `assign_quantizers` said of them.

    Raises:
        ValueError: as `prepare`.
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
    """Returns the static half of `prepare_layers`: it looks at the signs of inputs and calibrates nothing.

    Args:
        run: see `prepare`.
        params: see `prepare`.
        batches: see `prepare`.
        layers: what `find_layers` found.
        settings: what `assign_quantizers` said of them.

    Raises:
        ValueError: as `prepare`.
    """
    batches, settings = _as_list(batches), fit_settings(layers, settings)
    return build_quantization(layers, settings, find_signed_inputs(run, params, batches, layers, settings))


def fit_settings(layers: Mapping[str, Layer], settings: Mapping[str, LayerSettings]) -> dict[str, LayerSettings]:
    """Returns settings without those of inputs that cannot be quantized, such as the integers of an embedding."""
    return {
        path: own if layers[path].has_input else dataclasses.replace(own, activations=None)
        for path, own in settings.items()
    }


def check_unquantized(found: Layers, share: float, allowed: float) -> None:
    """Checks that quantizers reach enough of a network.

    Args:
        found: what `find_layers` returns.
        share: what `unquantized_share` returns.
        allowed: the largest share.

    Raises:
        ValueError: naming the weights that no quantizer reaches, with their share.
    """
    if share > allowed:
        listed = '; '.join(f'{path}: {reason}' for path, reason in found.others.items())
        raise ValueError(
            f'No quantizer reaches {share:.0%} of the multiply-accumulates with weights, and allow_unquantized='
            f'{allowed:g} ({listed}). Make the layers known '
            'with register_layer, or allow more.'
        )


def _as_list(batches: Iterable[Any]) -> list[Any]:
    """Batches that can be read more than once."""
    if hasattr(batches, 'shape') or isinstance(batches, Mapping):
        raise ValueError('batches is one batch: write [batch], a list of them.')
    batches = list(batches)
    if not batches:
        raise ValueError('Calibration needs at least one batch.')
    return batches
