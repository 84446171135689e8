"""Evaluation of a whole split, every example exactly once."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from bqat_jax.distributed.replicas import values_of


class Evaluation(NamedTuple):
    """What an evaluation gives.

    Attributes:
        top1: fraction of examples whose largest logit is their label's.
        examples: number of examples counted.
    """

    top1: float
    examples: int


def evaluate(step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any]) -> tuple[Evaluation, ...]:
    """Evaluates every replica of a network on a split.

    Args:
        step: counts 'correct' and 'examples' of a batch, for every replica; see `make_evaluation_step`.
        batches: of the split, on the devices, at least one; the last batch is filled up and masked.
    """
    totals: Any = None
    for batch in batches:
        counts = step(batch)
        totals = counts if totals is None else jax.tree.map(jax.numpy.add, totals, counts)
    totals = jax.device_get(totals)
    return tuple(
        Evaluation(correct / examples, int(examples))
        for correct, examples in zip(values_of(totals['correct']), values_of(totals['examples']), strict=True)
    )
