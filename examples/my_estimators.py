"""Two gradient estimators with a known verdict, used in docs/research.md.

Command: python -m research.verdict --plugin=examples/my_estimators.py --estimator=turned
"""

import bqat_jax as bq


@bq.register_estimator('copy')
class Copy(bq.Estimator):
    """The straight-through estimator under another name."""

    def backward(self, cotangent, value, rounded, context):
        """Returns the gradient unchanged."""
        return cotangent


@bq.register_estimator('turned')
class Turned(bq.Estimator):
    """The straight-through estimator with the opposite sign: it increases the loss."""

    def backward(self, cotangent, value, rounded, context):
        """Returns the negated gradient."""
        return -cotangent
