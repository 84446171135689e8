"""What a report measures on a trained network: histograms at its quantizers, features against the partner's."""

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

# Bins of an input's clip range, and of as much beside it on each side; the outermost have all that lies beyond.
BINS_INSIDE, BINS_BESIDE = 32, 8
BINS = BINS_INSIDE + 2 * BINS_BESIDE
# Of an input so many numbers, evenly spaced, are sorted into bins; more would not be seen.
MOST_BINNED = 2**18


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen at one quantizer.

    Attributes:
        snr: signal-to-noise ratio of quantization, dB.
        clipped: fraction of the values beyond the outermost levels.
        histogram: int64; of weights how many have each code, from the smallest code on; of inputs how many lie in
            each of `BINS`.
        first_code: of weights the smallest code; of inputs 0.
        bits: of the quantizer.
    """

    snr: float
    clipped: float
    histogram: np.ndarray
    first_code: int
    bits: int


def no_counts(quantizer: Quantizer) -> Counts:
    """Returns the counts of nothing; see `count_values`."""
    bins = quantizer.upper - quantizer.lower + 1 if quantizer.of_weights else BINS
    return {**no_errors(quantizer), 'histogram': jnp.zeros(bins)}


def count_values(quantizer: Quantizer, parameters: Any, v: jax.Array) -> Counts:
    """Returns errors, see `count_errors`, and 'histogram': weights by code, inputs by place in the clip range."""
    histogram = count_codes if quantizer.of_weights else count_places
    return {
        **count_errors(quantizer, parameters, v),
        'histogram': histogram(quantizer, parameters, v).astype(jnp.float32),
    }


def count_codes(quantizer: Quantizer, parameters: Any, v: jax.Array) -> jax.Array:
    """Returns how many weights have each code, int32 (levels,), from the smallest code on."""
    codes = quantizer.encode(parameters, v).astype(jnp.int32).reshape(-1) - quantizer.lower
    return jnp.zeros(quantizer.upper - quantizer.lower + 1, jnp.int32).at[codes].add(1)


def count_places(quantizer: Quantizer, parameters: Any, v: jax.Array) -> jax.Array:
    """Returns how many inputs lie in each part of the clip range and beside it, int32 (BINS,); NaN lies nowhere.

    The clip range reaches from the smallest level to the largest.
    """
    lowest, highest = quantizer.limits(quantizer.prepare(parameters, v), v.ndim)
    width = jnp.maximum(highest - lowest, jnp.finfo(jnp.float32).tiny)
    place = ((v.astype(jnp.float32) - lowest) / width).reshape(-1)
    place = place[:: _stride(place.size)]
    number = jnp.floor(jnp.clip(place * BINS_INSIDE, -BINS_BESIDE, BINS_INSIDE + BINS_BESIDE - 1))
    number = jnp.where(place == 1, BINS_INSIDE - 1, number)  # the largest level itself is within
    is_number = ~jnp.isnan(place)
    bins = jnp.where(is_number, number, 0).astype(jnp.int32) + BINS_BESIDE
    return jnp.zeros(BINS, jnp.int32).at[bins].add(is_number.astype(jnp.int32))


def _stride(size: int) -> int:
    """The distance of values that are sorted into bins: prime to the size, so that it meets every channel alike."""
    stride = -(-size // MOST_BINNED)
    while math.gcd(stride, size) > 1:
        stride += 1
    return max(1, stride)


VALUES = Counting(no_counts, count_values)


def look_at_quantizers(replacement: BlockReplacement, variables: Variables, inputs: Any) -> dict[str, dict[str, Look]]:
    """Returns what is seen at every quantizer of the LP network for one batch, by layer and role.

    Layers that are stacked are taken together.

    Args:
        replacement: the network and its quantizers.
        variables: of one network.
        inputs: a batch, as the network takes it.
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

    Row i is LP block i, see `linear_cka` for the formula (Kornblith et al. 2019, arXiv:1905.00414). Of a block that
    gives several arrays the first of floating-point numbers is compared. NaN where features are not finite.

    Args:
        replacement: the network and its quantizers.
        variables: of one network.
        partner: the partner's variables; None without a partner.
        inputs: a batch, as the network takes it; CKA depends on its size.

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
