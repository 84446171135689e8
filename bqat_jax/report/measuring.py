"""Measurements of a trained network for a report: histograms at its quantizers, features against the partner's."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.analysis.measurement import first_float
from bqat_jax.analysis.measures import alignment, centred_gram, decibels
from bqat_jax.analysis.observing import Counting, Counts, count_errors, no_errors, observe_quantizers
from bqat_jax.quantizers import Quantizer
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.paths import Variables, bind_partner, run_backbone, run_teacher

# Bins within an input's clip range, and bins of that width on each side; the outermost hold all values beyond.
BINS_INSIDE, BINS_BESIDE = 32, 8
BINS = BINS_INSIDE + 2 * BINS_BESIDE
# The most values of an input that are counted; more would not change the picture.
MOST_BINNED = 2**18


@dataclasses.dataclass(frozen=True)
class Look:
    """Measurements of one quantizer.

    Attributes:
        snr: signal-to-noise ratio of quantization, dB.
        clipped: fraction of the values beyond the outermost levels.
        histogram: int64; counts of weights by code, from the smallest code on, or counts of inputs in `BINS` bins.
        first_code: the smallest code of weights; 0 for inputs.
        bits: bits of the quantizer.
    """

    snr: float
    clipped: float
    histogram: np.ndarray
    first_code: int
    bits: int


def no_counts(quantizer: Quantizer) -> Counts:
    """Returns zero counts; see `count_values`."""
    bins = quantizer.upper - quantizer.lower + 1 if quantizer.of_weights else BINS
    return {**no_errors(quantizer), 'histogram': jnp.zeros(bins)}


def count_values(quantizer: Quantizer, parameters: Any, v: jax.Array) -> Counts:
    """Returns the counts of `count_errors` and a 'histogram': weights by code, inputs by bin of the clip range."""
    histogram = count_codes if quantizer.of_weights else count_places
    return {
        **count_errors(quantizer, parameters, v),
        'histogram': histogram(quantizer, parameters, v).astype(jnp.float32),
    }


def count_codes(quantizer: Quantizer, parameters: Any, v: jax.Array) -> jax.Array:
    """Returns the number of weights with each code, int32 (levels,), from the smallest code on."""
    codes = quantizer.encode(parameters, v).astype(jnp.int32).reshape(-1) - quantizer.lower
    return jnp.zeros(quantizer.upper - quantizer.lower + 1, jnp.int32).at[codes].add(1)


def count_places(quantizer: Quantizer, parameters: Any, v: jax.Array) -> jax.Array:
    """Returns the number of inputs in each bin of the clip range and beside it, int32 (BINS,), without NaN.

    The clip range is that from the smallest to the largest level.
    """
    lowest, highest = quantizer.limits(quantizer.prepare(parameters, v), v.ndim)
    width = jnp.maximum(highest - lowest, jnp.finfo(jnp.float32).tiny)
    place = ((v.astype(jnp.float32) - lowest) / width).reshape(-1)
    place = place[:: _stride(place.size)]
    number = jnp.floor(jnp.clip(place * BINS_INSIDE, -BINS_BESIDE, BINS_INSIDE + BINS_BESIDE - 1))
    number = jnp.where(place == 1, BINS_INSIDE - 1, number)  # the largest level is inside
    is_number = ~jnp.isnan(place)
    bins = jnp.where(is_number, number, 0).astype(jnp.int32) + BINS_BESIDE
    return jnp.zeros(BINS, jnp.int32).at[bins].add(is_number.astype(jnp.int32))


def _stride(size: int) -> int:
    """The stride of counted values, coprime to the size, so that all channels are sampled equally."""
    stride = -(-size // MOST_BINNED)
    while math.gcd(stride, size) > 1:
        stride += 1
    return max(1, stride)


VALUES = Counting(no_counts, count_values)


def look_at_quantizers(replacement: BlockReplacement, variables: Variables, inputs: Any) -> dict[str, dict[str, Look]]:
    """Measures every quantizer of the LP network on one batch; returns the results by layer and role.

    Stacked layers have one common result.

    Args:
        replacement: the network and its quantizers.
        variables: variables of one network.
        inputs: a batch of the network's inputs.
    """

    @jax.jit
    def look(variables, inputs):
        return observe_quantizers(replacement, variables, inputs, VALUES)

    counts = jax.device_get(look(variables, inputs))
    quantization = replacement.quantization
    looks: dict[str, dict[str, Look]] = {}
    for path, role, quantizer in quantization.quantizers():
        looks.setdefault(path, {})[role] = _summarize(quantizer, counts[path][role])
    return looks


def _summarize(quantizer: Quantizer, counts: Any) -> Look:
    signal, noise, clipped, values = (
        np.sum(counts[name], dtype=np.float64) for name in ('signal', 'noise', 'clipped', 'values')
    )
    histogram = counts['histogram'].reshape(-1, counts['histogram'].shape[-1])
    return Look(
        snr=float(decibels(jnp.float32(signal), jnp.float32(noise))),
        clipped=float(clipped / max(values, 1)),
        histogram=np.sum(np.rint(histogram).astype(np.int64), axis=0),
        first_code=quantizer.lower if quantizer.of_weights else 0,
        bits=quantizer.bits,
    )


def compare_features(
    replacement: BlockReplacement, variables: Variables, partner: Any, inputs: Any
) -> np.ndarray | None:
    """Returns the linear CKA of every LP block's features with those of every FP block, float (blocks, blocks).

    Row i is LP block i; see `linear_cka` for the formula (Kornblith et al. 2019, arXiv:1905.00414). For a block with
    several outputs the first floating-point array is compared. NaN if features are not finite.

    Args:
        replacement: the network and its quantizers.
        variables: variables of one network.
        partner: the partner's variables; None without a partner.
        inputs: a batch of the network's inputs; CKA depends on its size.

    Returns:
        The matrix; None without a partner.
    """
    if partner is None:
        return None
    network = replacement.network

    @jax.jit
    def compare(variables, partner, inputs):
        low = run_backbone(network, replacement.quantization, variables, inputs, train=False)
        full = run_teacher(bind_partner(network, partner), inputs)
        grams = [[centred_gram(first_float(h)) for h in run.features] for run in (low, full)]
        return jnp.stack([jnp.stack([alignment(x, y) for y in grams[1]]) for x in grams[0]])

    return np.asarray(jax.device_get(compare(variables, partner, inputs)), np.float64)
