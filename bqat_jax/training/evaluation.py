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
        not_finite: number of these with a logit that is NaN or infinite; they count as wrong.
    """

    top1: float
    examples: int
    not_finite: int = 0


def evaluate(step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any]) -> tuple[Evaluation, ...]:
    """Evaluates every replica of a network on a split.

    Args:
        step: counts 'correct', 'examples' and 'not_finite' of a batch, for every replica; see `make_evaluation_step`.
        batches: of the split, on the devices, at least one; the last batch is filled up and masked.
    """
    totals: Any = None
    for batch in batches:
        counts = step(batch)
        totals = counts if totals is None else jax.tree.map(jax.numpy.add, totals, counts)
    totals = jax.device_get(totals)
    return tuple(
        Evaluation(correct / examples, int(examples), int(not_finite))
        for correct, examples, not_finite in zip(
            *(values_of(totals[name]) for name in ('correct', 'examples', 'not_finite')), strict=True
        )
    )
