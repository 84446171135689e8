"""Two gradient estimators whose verdict is known: docs/research.md tries them.

Command: python -m research.verdict --plugin=examples/my_estimators.py --estimator=turned
"""

import bqat_jax as bq


@bq.register_estimator('copy')
class Copy(bq.Estimator):
    """The straight-through estimator under another name."""

    def backward(self, cotangent, value, rounded, context):
        """Returns the gradient as it came."""
        return cotangent


@bq.register_estimator('turned')
class Turned(bq.Estimator):
    """The straight-through estimator with its sign turned: it climbs the loss."""

    def backward(self, cotangent, value, rounded, context):
        """Returns the gradient with its sign turned."""
        return -cotangent
