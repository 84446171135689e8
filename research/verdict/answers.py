"""Turns differences into answers: better, worse, not distinguishable, or not yet decided; pure functions."""

import dataclasses
from collections.abc import Sequence

from research.verdict.paired_tests import (
    Paired,
    detectable,
    holm,
    interval,
    look_shares,
    p_value,
    sequential_p,
)

LEVEL, POWER = 0.05, 0.8
BETTER, WORSE, NOT_DISTINGUISHABLE, UNDECIDED = 'better', 'worse', 'not distinguishable', 'not yet decided'


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate against a reference, in one setting.

    Attributes:
        setting: name of the setting.
        reference: name of the reference.
        planned: numbers of seeds at all looks.
        looks: differences at the looks so far, candidate minus reference.
    """

    setting: str
    reference: str
    planned: tuple[int, ...]
    looks: tuple[Paired, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a comparison.

    Attributes:
        comparison: the comparison.
        outcome: one of the four outcomes.
        is_same: whether the scores are equal in every seed.
        p: p-value, corrected for looks and for the number of comparisons.
        interval: 95 % interval of the mean difference at the last look, not corrected; None before the first look.
        detectable: the difference that the last planned look detects with 80 % power, given the measured spread; None
            before the first look.
    """

    comparison: Comparison
    outcome: str
    is_same: bool
    p: float
    interval: tuple[float, float] | None
    detectable: float | None

    @property
    def is_decided(self) -> bool:
        """Whether no more seeds are needed or planned."""
        return self.outcome != UNDECIDED


def answer(comparisons: Sequence[Comparison], level: float = LEVEL) -> list[Answer]:
    """Returns the answers to all comparisons of a verdict.

    The probability of any false 'better' or 'worse' is at most `level`, over all looks and comparisons; comparisons
    without a look have p = 1. A difference of zero in every seed ends a comparison at its first look, since stopping
    without a claim cannot add a false one.

    Args:
        comparisons: all comparisons, including those without a look.
        level: bound of the probability of a false claim.
    """
    corrected = holm([_p(one, level) for one in comparisons])
    return [_answer(one, p, len(comparisons), level) for one, p in zip(comparisons, corrected, strict=True)]


def _p(comparison: Comparison, level: float) -> float:
    return sequential_p([p_value(look) for look in comparison.looks], look_shares(comparison.planned, level))


def _answer(comparison: Comparison, p: float, number: int, level: float) -> Answer:
    if not comparison.looks:
        return Answer(comparison, UNDECIDED, False, 1.0, None, None)
    last, shares = comparison.looks[-1], look_shares(comparison.planned, level)
    if p <= level:
        # The direction is that of the most significant look.
        shown = min(zip(comparison.looks, shares, strict=False), key=lambda pair: p_value(pair[0]) / pair[1])[0]
        outcome = BETTER if shown.mean > 0 else WORSE
    elif last.is_same or len(comparison.looks) == len(comparison.planned):
        outcome = NOT_DISTINGUISHABLE
    else:
        outcome = UNDECIDED
    # At the last look, with the strictest level of Holm's method.
    seen = detectable(dataclasses.replace(last, seeds=comparison.planned[-1]), level * shares[-1] / number, POWER)
    return Answer(comparison, outcome, last.is_same, p, interval(last, 0.05), seen)
