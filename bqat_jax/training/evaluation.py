"""Evaluation of a whole split, every example exactly once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from bqat_jax.replacement.tasks import Task


class Evaluation(NamedTuple):
    """What an evaluation gives.

    Attributes:
        metrics: the task's, by name, such as 'top1'.
        examples: number of examples counted.
        not_finite: number of these with an output that is NaN or infinite; to classify, they count as wrong.
    """

    metrics: Mapping[str, float]
    examples: int
    not_finite: int = 0


def evaluate(step: Callable[[Any], dict[str, jax.Array]], batches: Iterable[Any], task: Task) -> tuple[Evaluation, ...]:
    """Evaluates every replica of a network on a split.

    Args:
        step: the counts of a batch, for every replica; see `make_evaluation_step`.
        batches: of the split, on the devices, at least one; the last batch is filled up and masked.
        task: makes metrics of the counts.
    """
    totals: Any = None
    waiting: Any = None  # a batch's counts are fetched while the next batch runs
    for batch in batches:
        counts, waiting = waiting, step(batch)
        totals = add_counts(totals, counts)
    totals = add_counts(totals, waiting)
    if totals['examples'].ndim == 0:  # a single run, whose arrays have no axis for replicas
        of_each = [totals]
    else:
        count = len(totals['examples'])
        of_each = [{name: total[number] for name, total in totals.items()} for number in range(count)]
    return tuple(
        Evaluation(task.results(counts), int(counts['examples']), int(counts['not_finite'])) for counts in of_each
    )


def add_counts(totals: Any, counts: Any) -> Any:
    """Returns the sums of a task's counts in int64 and float64, on the host: those of a split fit no smaller types.

    Args:
        totals: of the batches before; None for none.
        counts: of a batch; None for none.
    """
    if counts is None:
        return totals
    wide = {
        name: np.asarray(count, np.float64 if np.issubdtype(count.dtype, np.floating) else np.int64)
        for name, count in jax.device_get(counts).items()
    }
    return wide if totals is None else {name: totals[name] + wide[name] for name in wide}
