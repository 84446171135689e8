"""The statistics of a verdict against scipy's, against simulation, and against worked examples."""

import math

import numpy as np
import pytest
from scipy import stats

from research.verdict.paired_tests import (
    Paired,
    detectable,
    holm,
    interval,
    look_shares,
    p_value,
    pair,
    power,
    sequential_p,
)

VALUES, OTHERS = (0.90, 0.88, 0.93, 0.91, 0.89), (0.88, 0.885, 0.90, 0.89, 0.88)


def test_p_value_and_interval_are_those_of_the_paired_t_test():
    paired, expected = pair(VALUES, OTHERS, 1e-9), stats.ttest_rel(VALUES, OTHERS)
    assert p_value(paired) == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval(0.95)
    assert interval(paired, 0.05) == pytest.approx((low, high))


def test_what_is_the_same_in_every_seed_has_no_effect_and_divides_by_nothing():
    paired = pair(VALUES, VALUES, 1 / 360)
    assert paired.is_same and paired.mean == 0 and p_value(paired) == pytest.approx(1.0)
    assert math.isfinite(detectable(paired, 0.01))
    with pytest.raises(ValueError, match='at least two'):
        pair((0.9,), (0.8,), 1 / 360)


def test_equal_differences_are_no_proof():
    """On a coarse scale three differences of one test example are often equal; their spread of zero says nothing."""
    paired = pair((0.5, 0.6, 0.7), (0.5 - 1 / 360, 0.6 - 1 / 360, 0.7 - 1 / 360), 1 / 360)
    assert not paired.is_same and p_value(paired) > 0.1


@pytest.mark.parametrize(
    ('seeds', 'shift', 'level'), [(3, 2.0, 0.05), (4, 8.0, 0.002), (8, 3.6, 0.0123), (8, 0.0, 0.05)]
)
def test_power_is_that_of_the_noncentral_t(seeds, shift, level):
    paired = Paired(0.0, math.sqrt(seeds), seeds, False)  # whose standard error is 1
    critical = stats.t.isf(level / 2, seeds - 1)
    # The lower tail is scipy's NaN where it is nothing.
    expected = stats.nct.sf(critical, seeds - 1, shift) + np.nan_to_num(stats.nct.cdf(-critical, seeds - 1, shift))
    assert power(shift, paired, level) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(('seeds', 'level'), [(4, 0.05), (8, 0.0148)])
def test_a_detectable_difference_is_seen_four_times_of_five(seeds, level):
    """Simulated: normal differences of that mean, tested by scipy."""
    spread = 0.013
    difference = detectable(Paired(0.0, spread, seeds, False), level)
    draws = np.random.default_rng(0).normal(difference, spread, (20_000, seeds))
    assert np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue <= level) == pytest.approx(0.8, abs=0.01)


def test_shares_follow_the_spending_function():
    assert sum(look_shares((3, 5, 8), 0.05)) == pytest.approx(1.0) and look_shares((8,), 0.05) == (1.0,)
    # a(1/2) = 0.00557 at 0.05: Lan and DeMets; the boundary at half of the information is 2.96.
    first, _ = look_shares((4, 8), 0.05)
    assert 0.05 * first == pytest.approx(0.00557, abs=1e-5)
    assert stats.norm.isf(0.05 * first / 2) == pytest.approx(2.77, abs=0.01)
    for looks in ((), (1, 3), (3, 3)):
        with pytest.raises(ValueError, match='must increase'):
            look_shares(looks, 0.05)


def test_holm_is_his():
    # Holm's procedure by hand: 0.01 * 3; then 0.02 * 2 = 0.04; then 0.03, which may not be smaller than the one before.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_without_a_difference_looks_and_comparisons_together_err_within_the_level():
    """Simulated verdicts: three comparisons with one candidate, looked at after 4 and 8 seeds, scores in examples."""
    rng, looks, level, test_examples = np.random.default_rng(1), (4, 8), 0.05, 360
    shares, trials, wrong = look_shares(looks, level), 2000, 0
    scores = rng.normal(0.9, 0.012, (trials, 4, looks[-1]))
    scores = np.round(scores * test_examples) / test_examples
    for candidate, *references in scores:
        p_values = [
            [p_value(pair(candidate[:n].tolist(), other[:n].tolist(), 1 / test_examples)) for n in looks]
            for other in references
        ]
        wrong += min(holm([sequential_p(p, shares) for p in p_values])) <= level
    assert wrong / trials <= level + 2 * math.sqrt(level / trials)
    assert wrong > 0


def test_looks_that_have_not_been_made_do_not_help():
    shares = look_shares((3, 5, 8), 0.05)
    assert sequential_p([], shares) == 1.0
    assert sequential_p([0.001], shares) == pytest.approx(0.001 / shares[0])
    assert sequential_p([0.001, 0.5, 0.01], shares) == pytest.approx(min(0.001 / shares[0], 0.01 / shares[2]))
