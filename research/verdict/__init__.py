"""From an idea for a gradient estimator to a verdict: better, worse, or not distinguishable."""
