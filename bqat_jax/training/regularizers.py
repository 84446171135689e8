"""Scheduled dampening and freezing of oscillating weights; see `bqat_jax.quantizers.oscillations`."""

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from bqat_jax.quantizers import QUANTIZERS, Quantizer
from bqat_jax.quantizers.oscillations import (
    AGGREGATIONS,
    MOST_BITS,
    Tracker,
    can_freeze,
    dampening_loss,
    freeze,
    init_tracker,
    track,
)
from bqat_jax.replacement.paths import Variables
from bqat_jax.transform import Layer, Quantization

# A weight oscillates visibly above this frequency; the bound of the paper's figures.
VISIBLE_FREQUENCY = 0.005


@dataclasses.dataclass(frozen=True)
class Regularizers:
    """Dampening and freezing; both are off by default.

    Attributes:
        dampening: λ at the end of training, reached from 0 along a cosine; 0 disables dampening.
        dampening_start: fraction of training at which λ starts to increase.
        dampening_aggregation: 'sum' or 'kernel_mean'.
        freezing: whether oscillating weights are frozen.
        freezing_threshold: frequency above which weights are frozen at the end of training.
        freezing_first_threshold: frequency above which weights are frozen at `freezing_start`; a cosine connects the
            two thresholds.
        freezing_start: fraction of training before which nothing is frozen; oscillations are tracked from the start.
        freezing_momentum: momentum of the moving averages.

    Raises:
        ValueError: for a value out of range.
    """

    dampening: float = 0.0
    dampening_start: float = 0.25
    dampening_aggregation: str = 'kernel_mean'
    freezing: bool = False
    freezing_threshold: float = 0.01
    freezing_first_threshold: float = 0.1
    freezing_start: float = 0.25
    freezing_momentum: float = 0.001

    def __post_init__(self):
        fractions = ('dampening_start', 'freezing_start', 'freezing_momentum')
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            most = 1 if field.name in fractions else sys.float_info.max
            if isinstance(value, float) and not 0 <= value <= most:
                above = ' and at most 1' if field.name in fractions else ''
                raise ValueError(f'quant.oscillations.{field.name}={value}: must be finite and at least 0{above}.')
        if self.dampening_aggregation not in AGGREGATIONS:
            raise ValueError(
                f'quant.oscillations.dampening_aggregation={self.dampening_aggregation!r}: must be one of '
                f'{", ".join(AGGREGATIONS)}.'
            )

    @property
    def dampens(self) -> bool:
        """Whether there is a dampening loss."""
        return self.dampening > 0

    def dampening_weight(self, progress: jax.Array) -> jax.Array:
        """Returns λ at `progress`, the completed fraction of training."""
        return self.dampening * _risen(progress, self.dampening_start)

    def threshold(self, progress: jax.Array) -> jax.Array:
        """Returns the frequency above which weights are frozen at `progress`, the completed fraction of training.

        The threshold is infinite before `freezing_start`, as in the authors' code
        (Qualcomm-AI-research/oscillations-qat).
        """
        change = self.freezing_threshold - self.freezing_first_threshold
        threshold = self.freezing_first_threshold + change * _risen(progress, self.freezing_start)
        return jnp.where(progress < self.freezing_start, jnp.inf, threshold)

    def loss(self, quantization: Quantization, variables: Variables, progress: jax.Array) -> jax.Array:
        """Returns the weighted dampening loss of all weights."""
        flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
        total = jnp.float32(0)
        for path, quantizer in _weights(quantization):
            total += dampening_loss(
                quantizer,
                variables.quantizers[path]['weights'],
                flat[quantization.weight_path(path)],
                self.dampening_aggregation,
            )
        return self.dampening_weight(progress) * total

    def init_trackers(self, quantization: Quantization, variables: Variables) -> dict[str, Tracker]:
        """Returns a tracker for every layer with low-bit weights, or {} without freezing."""
        if not self.freezing:
            return {}
        flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
        return {
            path: init_tracker(quantizer, variables.quantizers[path]['weights'], flat[quantization.weight_path(path)])
            for path, quantizer in _weights(quantization)
        }

    def check(self, path: str, quantizer: Quantizer, layer: Layer) -> None:
        """Raises ValueError if a layer or its quantizer does not support the regularizers."""
        if (self.freezing or self.dampens) and quantizer.bits <= MOST_BITS and not layer.is_plain:
            raise ValueError(
                f'quant.oscillations: the weights of layer {path} can be neither dampened nor frozen, because they '
                f'are {"stacked" if layer.stack else "not laid out with their output channels last"}. Give them more '
                f'than {MOST_BITS} bits or full precision by a rule in quant.rules, or disable both.'
            )
        if self.freezing and quantizer.bits <= MOST_BITS and not can_freeze(quantizer):
            raise ValueError(
                f'quant.oscillations.freezing: the weights of layer {path} cannot be frozen, because the quantizer '
                f'{QUANTIZERS.describe(quantizer)!r} computes its scale from them or scales its output. Use lsq, '
                'lsq_plus, pact, nulsq, minmax or octav, or use dampening.'
            )

    def freeze(
        self,
        quantization: Quantization,
        trackers: dict[str, Tracker],
        variables: Variables,
        progress: jax.Array,
    ) -> tuple[dict[str, Tracker], Any]:
        """Returns trackers and network parameters after an optimizer step, with frozen weights set to their levels."""
        flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
        new = {}
        for path, quantizer in _weights(quantization):
            if path in trackers:
                name, own = quantization.weight_path(path), variables.quantizers[path]['weights']
                codes = quantizer.encode(own, flat[name])
                new[path] = track(trackers[path], codes, self.freezing_momentum, self.threshold(progress))
                flat[name] = freeze(quantizer, own, flat[name], new[path])
        return new, traverse_util.unflatten_dict(flat, sep='/')


def oscillation_metrics(trackers: dict[str, Tracker]) -> dict[str, jax.Array]:
    """Returns the fractions of tracked weights that are frozen and that visibly oscillate."""
    if not trackers:
        return {}
    count = sum(tracker.codes.size for tracker in trackers.values())
    frozen = sum((jnp.sum(tracker.is_frozen) for tracker in trackers.values()), jnp.int32(0))
    oscillating = sum(
        (jnp.sum((tracker.frequency > VISIBLE_FREQUENCY) & ~tracker.is_frozen) for tracker in trackers.values()),
        jnp.int32(0),
    )
    return {
        'frozen_weights': frozen.astype(jnp.float32) / count,
        'oscillating_weights': oscillating.astype(jnp.float32) / count,
    }


def _weights(quantization: Quantization) -> Iterable[tuple[str, Quantizer]]:
    """Yields (layer path, quantizer) of low-bit weights."""
    for path, role, quantizer in quantization.quantizers():
        if role == 'weights' and quantizer.bits <= MOST_BITS:
            yield path, quantizer


def _risen(progress: jax.Array, start: float) -> jax.Array:
    """Returns a cosine schedule from 0 at `start` to 1 at the end of training."""
    done = jnp.clip((progress - start) / max(1 - start, 1e-6), 0.0, 1.0)
    return 0.5 * (1 - jnp.cos(jnp.pi * done))
