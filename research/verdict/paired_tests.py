"""Paired, sequential and multiple tests of methods over seeds, as pure functions.

Two methods are compared by the differences of their scores, paired by seed: a seed gives both one order of data and one
stream of random numbers, whose effect cancels. Differences are assumed independent and normal (Student, 1908).

The data are looked at several times, and each look may decide. To bound the error of all looks by the level, each look
has a share of the level (`look_shares`), and its p-value is divided by its share (`sequential_p`): by Bonferroni's
inequality this holds for any dependence between looks. Several comparisons are corrected by Holm's method (`holm`),
which bounds the probability of any false claim by the level.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

# Quantiles of a sample's spread, for integration.
QUANTILES = (np.arange(4000) + 0.5) / 4000


@dataclasses.dataclass(frozen=True)
class Paired:
    """Differences of two methods over seeds.

    Attributes:
        mean: mean of the differences.
        spread: their standard deviation, at least the resolution of the scores.
        seeds: number of seeds.
        is_same: whether all differences are zero.
    """

    mean: float
    spread: float
    seeds: int
    is_same: bool

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return self.spread / math.sqrt(self.seeds)


def pair(values: Sequence[float], others: Sequence[float], resolution: float) -> Paired:
    """Returns the differences of two methods, the first minus the second.

    Args:
        values: scores of one method, by seed.
        others: scores of the other method for these seeds.
        resolution: the smallest nonzero difference of two scores, such as one test example. On this scale few seeds
            often have equal differences, and a spread of zero would make any mean significant.

    Raises:
        ValueError: for fewer than two seeds, or different numbers of them.
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    if len(differences) < 2:
        raise ValueError(f'{len(differences)} seeds: a spread needs at least two.')
    spread = max(statistics.stdev(differences), resolution)
    return Paired(statistics.mean(differences), spread, len(differences), not any(differences))


def p_value(paired: Paired) -> float:
    """Returns the two-sided p-value of the paired t-test for a mean difference of zero."""
    return float(2 * stats.t.sf(abs(paired.mean) / paired.error, paired.seeds - 1))


def interval(paired: Paired, level: float) -> tuple[float, float]:
    """Returns Student's confidence interval of the mean difference, with error probability `level`."""
    half = float(stats.t.isf(level / 2, paired.seeds - 1)) * paired.error
    return paired.mean - half, paired.mean + half


def power(difference: float, paired: Paired, level: float) -> float:
    """Returns the probability that the two-sided paired t-test at `level` detects a difference.

    It is that of the noncentral t distribution with seeds - 1 degrees of freedom (Cohen, Statistical Power Analysis,
    1988, section 2.4). The measured spread is assumed to be the true one.
    """
    freedom, shift = paired.seeds - 1, abs(difference) / paired.error
    critical = float(stats.t.isf(level / 2, freedom))
    # Integrated over a sample's spread, since scipy's noncentral t is NaN in far tails.
    bounds = critical * np.sqrt(stats.chi2.ppf(QUANTILES, freedom) / freedom)
    return float(np.mean(stats.norm.sf(bounds - shift) + stats.norm.cdf(-bounds - shift)))


def detectable(paired: Paired, level: float, wanted: float = 0.8) -> float:
    """Returns the smallest true difference that the test at `level` detects with probability `wanted`."""
    most = paired.error

    def lacking(difference: float) -> float:
        return power(difference, paired, level) - wanted

    while lacking(most) < 0:
        most *= 2
    root: Any = optimize.brentq(lacking, 0.0, most, xtol=1e-6 * most)
    return float(root)


def look_shares(looks: Sequence[int], level: float) -> tuple[float, ...]:
    """Returns each look's share of the level; shares sum to one.

    They are the increments of the spending function a(t) = 2 - 2 Phi(z / sqrt(t)), with Phi(z) = 1 - level / 2 and t
    the fraction of seeds at a look (Lan and DeMets, Biometrika 70, 1983, after O'Brien and Fleming, Biometrics 35,
    1979): early looks are strict, and the last one has most of the level. The increments are used as separate levels,
    by Bonferroni's inequality, which is simpler and stricter than the boundaries of that paper.

    Args:
        looks: numbers of seeds at the looks, increasing.
        level: level of the complete test.

    Raises:
        ValueError: if there are no looks, or they do not increase from at least two.
    """
    if not looks or looks[0] < 2 or any(b <= a for a, b in itertools.pairwise(looks)):
        raise ValueError(f'looks={list(looks)}: must increase from at least 2 seeds.')
    z = stats.norm.isf(level / 2)
    spent = [float(2 * stats.norm.sf(z / math.sqrt(seeds / looks[-1]))) / level for seeds in looks[:-1]]
    return tuple(after - before for before, after in itertools.pairwise([0.0, *spent, 1.0]))


def sequential_p(p_values: Sequence[float], shares: Sequence[float]) -> float:
    """Returns a p-value that is valid whenever looking stops: the smallest p / share over looks, at most 1.

    P(min p_k / s_k <= u) <= sum P(p_k <= s_k u) = u, as shares sum to one; fewer looks only make it larger.

    Args:
        p_values: p-values of the looks so far.
        shares: shares of all looks.
    """
    return min([1.0, *(p / share for p, share in zip(p_values, shares[: len(p_values)], strict=True))])


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm's method (Scandinavian Journal of Statistics 6, 1979)."""
    corrected, so_far = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = so_far
    return corrected
