"""Draws every gradient estimator's backward rule at 2 bits (1 bit for those that approximate the sign).

Command: python -m research.draw_estimators docs/estimators.png
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from bqat_jax.quantizers.estimators import ESTIMATORS
from bqat_jax.quantizers.rounding import Context, QuantizeSpec, quantize

COLUMNS = 5
POINTS = 1201
# An example of a strength measured by `ewgs_trace`.
EXAMPLE_DELTA = 1.0


def gradient(name: str, cotangent: float, progress: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and the gradient at them for rounding to -2 .. 1, or to -1 .. 0 for estimators of the sign."""
    estimator = ESTIMATORS.make(name)
    lower, upper = (-1, 0) if estimator.sign_only else (-2, 1)
    how = QuantizeSpec(estimator, lower, upper)
    x = jnp.linspace(lower - 1.2, upper + 1.2, POINTS)
    context = Context(jnp.float32(progress), jax.random.key(0), jnp.float32(EXAMPLE_DELTA))
    _, pullback = jax.vjp(lambda v: quantize(how, jnp.float32(1), jnp.float32(0), v, context), x)
    return np.asarray(x), np.asarray(pullback(jnp.full_like(x, cotangent))[0]) / cotangent


def draw(path: str) -> None:
    """Writes the figure, with one panel for every registered estimator."""
    names = list(ESTIMATORS)
    rows = -(-len(names) // COLUMNS)
    figure, panels = plt.subplots(rows, COLUMNS, figsize=(3 * COLUMNS, 2.3 * rows), squeeze=False, layout='constrained')
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for name, panel in zip(names, panels.flat, strict=False):
        estimator = ESTIMATORS.make(name)
        x, positive = gradient(name, 1.0, 0.0)
        panel.plot(x, positive, label='g > 0' if name.startswith('ewgs') else None)
        if name.startswith('ewgs'):
            panel.plot(x, gradient(name, -1.0, 0.0)[1], '--', label='g < 0')
        late = gradient(name, 1.0, 1.0)[1]
        if not np.allclose(late, positive):
            panel.plot(x, late, ':', label='end of training')
        for code in (-1, 0) if estimator.sign_only else (-2, -1, 0, 1):
            panel.axvline(code, color='0.85', zorder=0)
        panel.set_title(name + (' (1 bit)' if estimator.sign_only else ''))
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize='x-small')
    figure.supxlabel('input in the integer domain; grey lines are codes')
    figure.supylabel('gradient of the input / gradient of the output')
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == '__main__':
    draw(sys.argv[1])
