"""Evaluation of a whole split, every example exactly once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from bqat_jax.data.pipeline import Split
from bqat_jax.training.sharding import over_batch


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        top1: fraction of examples whose largest logit is their label's.
        examples: number of examples counted.
    """

    top1: float
    examples: int


def evaluate(
    step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batch_stats: Any,
    split: Split,
    batch_size: int,
    mesh: Mesh,
) -> Evaluation:
    """Evaluates a network on a split.

    Args:
        step: from `make_evaluation_step`.
        params: {'network': ..., 'quantizers': ...}.
        batch_stats: the network's batch statistics.
        split: what to evaluate on, not empty.
        batch_size: examples per batch, a multiple of the number of devices; the last batch is filled up and masked.
        mesh: the devices.
    """
    counts = None
    for batch in split.evaluation_batches(batch_size):
        found = step(params, batch_stats, split.arrays, jax.device_put(batch, over_batch(mesh)))
        counts = found if counts is None else jax.tree.map(jax.numpy.add, counts, found)
    counts = jax.device_get(counts)
    return Evaluation(int(counts['correct']) / int(counts['examples']), int(counts['examples']))
