"""Evaluation of a whole split, every example exactly once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bqat_jax.data.pipeline import Split
from bqat_jax.distributed.processes import put_batch
from bqat_jax.distributed.replicas import Replicas, values_of


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
    replicas: Replicas,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[Evaluation, ...]:
    """Evaluates every replica of a network on a split.

    Args:
        step: from `make_evaluation_step`.
        params: {'network': ..., 'quantizers': ...}.
        batch_stats: the network's batch statistics.
        split: what to evaluate on, not empty.
        batch_size: examples per batch, a multiple of the number of devices; the last batch is filled up and masked.
        replicas: how many there are.
        before_each: called before every batch; what it raises ends the evaluation.
    """
    counts = None
    for batch in split.evaluation_batches(batch_size):
        before_each()
        found = step(params, batch_stats, split.arrays, put_batch(batch, replicas.evaluation_sharding))
        counts = found if counts is None else jax.tree.map(jax.numpy.add, counts, found)
    counts = jax.device_get(counts)
    return tuple(
        Evaluation(correct / examples, int(examples))
        for correct, examples in zip(values_of(counts['correct']), values_of(counts['examples']), strict=True)
    )
