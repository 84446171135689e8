"""Evaluation of a complete split, every example exactly once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bqat_jax.replacement.tasks import Task


class Evaluation(NamedTuple):
    """The results of an evaluation.

    Attributes:
        metrics: the task's metrics by name, such as 'top1'.
        examples: number of counted examples.
        not_finite: number of counted examples with a NaN or infinite output; classification treats them as wrong.
    """

    metrics: Mapping[str, float]
    examples: int
    not_finite: int = 0


def evaluate(step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any], task: Task) -> tuple[Evaluation, ...]:
    """Evaluates every replica of a network on a split.

    Args:
        step: returns the counts of a batch for every replica; see `make_evaluation_step`.
        batches: batches of the split on the devices, at least one; the last batch is padded and masked.
        task: computes the metrics from the counts.
    """
    totals: Any = None
    waiting: Any = None  # Counts are fetched while the next batch runs.
    for batch in batches:
        counts, waiting = waiting, step(batch)
        totals = add_counts(totals, counts)
    totals = add_counts(totals, waiting)
    if totals['examples'].ndim == 0:  # A single run, whose arrays have no replica axis.
        of_each = [totals]
    else:
        count = len(totals['examples'])
        of_each = [{name: total[number] for name, total in totals.items()} for number in range(count)]
    return tuple(
        Evaluation(task.results(counts), int(counts['examples']), int(counts['not_finite'])) for counts in of_each
    )


def add_counts(totals: Any, counts: Any) -> Any:
    """Returns the sums of a task's counts on the host, in int64 and float64, because 32 bits are too few for a split.

    Args:
        totals: sums over previous batches, or None.
        counts: counts of a batch, or None.
    """
    if counts is None:
        return totals
    wide = {
        name: np.asarray(count, np.float64 if np.issubdtype(count.dtype, np.floating) else np.int64)
        for name, count in jax.device_get(counts).items()
    }
    return wide if totals is None else {name: totals[name] + wide[name] for name in wide}
