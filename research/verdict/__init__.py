"""Tests a gradient estimator against others: better, worse, or not distinguishable."""
