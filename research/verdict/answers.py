"""From differences to answers: better, worse, not distinguishable, or not yet decided; pure functions."""

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
        setting: its name.
        reference: its name.
        planned: seeds of all looks.
        looks: the differences at the looks so far, candidate minus reference.
    """

    setting: str
    reference: str
    planned: tuple[int, ...]
    looks: tuple[Paired, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is known of a comparison.

    Attributes:
        comparison: which.
        outcome: one of the four.
        is_same: whether the two have the same score in every seed.
        p: corrected for looks and for the number of comparisons.
        interval: of the mean difference at the last look, 95 %, not corrected; None before the first.
        detectable: the difference that would have been seen with 80 % power at the last planned look, if the spread is
            the one measured; None before the first look.
    """

    comparison: Comparison
    outcome: str
    is_same: bool
    p: float
    interval: tuple[float, float] | None
    detectable: float | None

    @property
    def is_decided(self) -> bool:
        """Whether more seeds would change nothing, or none are planned."""
        return self.outcome != UNDECIDED


def answer(comparisons: Sequence[Comparison], level: float = LEVEL) -> list[Answer]:
    """Returns the answers to all comparisons of a verdict.

    The probability that any 'better' or 'worse' is claimed where there is no difference is at most `level`, over all
    looks and comparisons; those that have not begun count as p = 1. A difference of zero in every seed ends a
    comparison at its first look: to stop without a claim cannot add a false one.

    Args:
        comparisons: all of them, also those that have not begun.
        level: see above.
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
        # The look that showed it says the direction.
        shown = min(zip(comparison.looks, shares, strict=False), key=lambda pair: p_value(pair[0]) / pair[1])[0]
        outcome = BETTER if shown.mean > 0 else WORSE
    elif last.is_same or len(comparison.looks) == len(comparison.planned):
        outcome = NOT_DISTINGUISHABLE
    else:
        outcome = UNDECIDED
    # At the end, against the strictest level that Holm's method may ask for.
    seen = detectable(dataclasses.replace(last, seeds=comparison.planned[-1]), level * shares[-1] / number, POWER)
    return Answer(comparison, outcome, last.is_same, p, interval(last, 0.05), seen)
