"""Measurements of a low-precision network at one training step.

Gradients are with respect to the weights that training updates, on training images without augmentation. The pseudo-
gradient of the quantized network's loss is compared with two references:

    full precision  the gradient of the loss at these weights without quantizers
    smoothed        the gradient of the loss averaged over perturbed weights: every weight is rounded up or down at
                    random with its value as the mean, and the straight-through gradients of K draws are averaged.
                    Averaged over draws, the loss is a smooth function of the weights.

Both references are ours; arXiv 2412.15846 claims truer gradients without, in what we could read, naming a reference.

Each `make_*` returns a function that keeps its compiled programs, so that repeated diagnoses compile once.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from bqat_jax.analysis.measures import (
    Products,
    decibels,
    linear_cka,
    products,
    relative_error,
)
from bqat_jax.analysis.observing import ERRORS, observe_quantizers
from bqat_jax.quantizers.estimators import get_estimator
from bqat_jax.quantizers.oscillations import init_tracker, track
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.block_replacement import Batch
from bqat_jax.replacement.paths import bind_partner, run_backbone, run_teacher
from bqat_jax.training.loss import task_loss_alone, total_loss
from bqat_jax.training.spec import TrainSpec
from bqat_jax.training.state import TrainState, floats_of
from bqat_jax.transform import FULL_PRECISION, Quantization

LOSSES = ('lp', 'full')
REFERENCES = ('full_precision', 'smoothed')
# Momentum of the moving average of oscillations.
MOMENTUM = 0.01


@dataclasses.dataclass(frozen=True)
class DiagnosisSettings:
    """The amount of data of a diagnosis.

    Attributes:
        batches: number of batches of training images.
        samples: K, number of draws of perturbed weights for the smoothed gradient.
        oscillation_steps: number of training steps in which oscillations are tracked; 0 for none.

    Raises:
        ValueError: for fewer than two batches or no sample.
    """

    batches: int
    samples: int
    oscillation_steps: int

    def __post_init__(self):
        for name, least in (('batches', 2), ('samples', 1), ('oscillation_steps', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'diagnosis.{name}={getattr(self, name)}: must be at least {least}.')


def make_gradient_measurement(
    spec: TrainSpec, blocks: Mapping[str, str], samples: int
) -> Callable[[TrainState, Any, Iterable[Batch]], dict[str, Any]]:
    """Returns a function that compares pseudo-gradients with their references and measures their variance over batches.

    Args:
        spec: the static parts of training.
        blocks: block name by layer path.
        samples: K.

    Returns:
        `measure(state, partner, batches)` for the state of one network, the partner's variables and at least two
        prepared batches. It returns {loss: {'layers': {path: measures}, 'blocks': {block: measures}}} for the losses
        'lp' (the task's loss of the LP network only, such as the labels' cross entropy) and 'full' (the training loss).
        The measures are 'cosine_to_*' and 'relative_norm_to_*', means over batches, and 'variance': the mean squared
        distance from the mean gradient of the batches, divided by that gradient's square.
    """
    task = task_loss_alone(spec)
    smooth = _with_estimator(task, 'stochastic')
    full_precision = _with_quantization(task, FULL_PRECISION)

    path_of = spec.replacement.quantization.weight_path

    def gradient(spec, variables, partner, batch, context, draw=None):
        def loss(params):
            return total_loss(spec, variables._replace(params=params), partner, batch, context, draw)[0]

        flat: Any = traverse_util.flatten_dict(jax.grad(loss)(variables.params), sep='/')
        return {path: flat[path_of(path)] for path in blocks}

    @jax.jit
    def compare(state, partner, batch, number):
        variables = state.variables
        context = Context(spec.progress(state.step), jax.random.fold_in(state.key, number), state.strengths)
        gradients = {
            'lp': gradient(task, variables, None, batch, context),
            'full': gradient(spec, variables, partner, batch, context, spec.draw(state.step + number)),
        }

        def add(total, key):
            drawn = gradient(smooth, variables, None, batch, context._replace(key=key))
            return jax.tree.map(lambda a, b: a + b / samples, total, drawn), None

        zeros = jax.tree.map(jnp.zeros_like, gradients['lp'])
        references = {
            'full_precision': gradient(full_precision, variables._replace(quantizers={}), None, batch, context),
            'smoothed': jax.lax.scan(add, zeros, jax.random.split(context.key, samples))[0],
        }
        compared = {
            loss: {
                reference: {path: products(gradients[loss][path], references[reference][path]) for path in blocks}
                for reference in REFERENCES
            }
            for loss in LOSSES
        }
        return gradients, compared

    groups: dict[str, dict[str, list[str]]] = {'layers': {path: [path] for path in blocks}, 'blocks': {}}
    for path, block in blocks.items():
        groups['blocks'].setdefault(block, []).append(path)

    def measure(state, partner, batches):
        comparisons, total, count = [], None, 0
        for number, batch in enumerate(batches):
            gradients, compared = compare(state, partner, batch, jnp.int32(number))
            total = gradients if total is None else jax.tree.map(jnp.add, total, gradients)
            comparisons.append(jax.device_get(compared))
            count += 1
        squares = jax.device_get(jax.tree.map(lambda x: jnp.sum((x / count) ** 2), total))
        return {
            loss: {
                kind: {name: _summarize(loss, comparisons, squares[loss], paths) for name, paths in members.items()}
                for kind, members in groups.items()
            }
            for loss in LOSSES
        }

    return measure


def _summarize(
    loss: str, comparisons: list[Any], mean_squares: Mapping[str, Any], paths: list[str]
) -> dict[str, float]:
    """Returns the measures of a group of layers."""
    measures: dict[str, float] = {}
    for reference in REFERENCES:
        merged = [_add([compared[loss][reference][path] for path in paths]) for compared in comparisons]
        measures[f'cosine_to_{reference}'] = float(sum(one.cosine for one in merged) / len(merged))
        measures[f'relative_norm_to_{reference}'] = float(sum(one.relative_norm for one in merged) / len(merged))
    # The sum of squares about the mean is the sum of squares less that of the mean.
    squares = sum(compared[loss][REFERENCES[0]][path].square for compared in comparisons for path in paths)
    mean = sum(mean_squares[path] for path in paths)
    measures['variance'] = float((squares - len(comparisons) * mean) / (len(comparisons) - 1) / max(mean, 1e-30))
    return measures


def _add(parts: list[Products]) -> Products:
    return jax.tree.map(lambda *values: sum(values[1:], values[0]), *parts)


def _with_quantization(spec: TrainSpec, quantization: Quantization) -> TrainSpec:
    replacement = dataclasses.replace(spec.replacement, quantization=quantization)
    return dataclasses.replace(spec, replacement=replacement)


def _with_estimator(spec: TrainSpec, name: str) -> TrainSpec:
    """Returns `spec` with another estimator for all weights."""
    estimator, layers = get_estimator(name), {}
    for path, layer in spec.replacement.quantization.layers.items():
        weights = None if layer.weights is None else dataclasses.replace(layer.weights, estimator=estimator)
        layers[path] = dataclasses.replace(layer, weights=weights)
    return _with_quantization(spec, Quantization(layers))


def make_feature_measurement(
    spec: TrainSpec,
) -> Callable[[TrainState, Any, Iterable[Batch]], dict[str, dict[str, float]]]:
    """Returns a function that compares the output of every LP block with the partner's.

    `measure(state, partner, batches)` returns 'cka' and 'relative_error' in evaluation by block, averaged over batches.
    Linear CKA depends on the batch size. If a block returns several arrays, the first floating-point array is measured.
    """
    network, quantization = spec.replacement.network, spec.replacement.quantization

    @jax.jit
    def compare(variables, partner, inputs):
        low = run_backbone(network, quantization, variables, inputs, train=False)
        full = run_teacher(bind_partner(network, partner), inputs)
        return [
            {'cka': linear_cka(h, g), 'relative_error': relative_error(h, g)}
            for h, g in zip(map(first_float, low.features), map(first_float, full.features), strict=True)
        ]

    def measure(state, partner, batches):
        measures = [jax.device_get(compare(state.variables, partner, batch.inputs)) for batch in batches]
        means: Any = jax.tree.map(lambda *values: float(sum(values) / len(values)), *measures)
        return {f'block {number}': mean for number, mean in enumerate(means, 1)}

    return measure


def first_float(feature: Any) -> jax.Array:
    """Returns the first floating-point array of a feature."""
    return floats_of(feature)[0]


def make_quantizer_measurement(
    spec: TrainSpec,
) -> Callable[[TrainState, Iterable[Batch]], dict[str, dict[str, dict[str, float]]]]:
    """Returns a function `measure(state, batches)` that measures quantization errors.

    It returns 'snr' in decibels and 'clipped', a fraction of all values, by layer and role. The signal is the input of
    the quantizer in the LP network in evaluation; the noise is the quantization error.
    """
    quantization = spec.replacement.quantization

    @jax.jit
    def look(variables, inputs):
        return observe_quantizers(spec.replacement, variables, inputs, ERRORS)

    def summarize(counts):
        return {
            'snr': float(decibels(counts['signal'], counts['noise'])),
            'clipped': float(counts['clipped'] / counts['values']),
        }

    def measure(state, batches):
        counts = [jax.device_get(look(state.variables, batch.inputs)) for batch in batches]
        sums = jax.tree.map(lambda *values: sum(value.sum() for value in values), *counts)
        # Restores the order of the layers, which `jax.tree.map` does not keep.
        return {path: {role: summarize(counts) for role, counts in sums[path].items()} for path in quantization.layers}

    return measure


def make_oscillation_measurement(
    spec: TrainSpec, step: Callable[[TrainState, Any], TrainState]
) -> Callable[[TrainState, Iterable[Any]], dict[str, float]]:
    """Returns a function that measures the fraction of weights that oscillate at least once, by layer.

    Args:
        spec: the static parts of training.
        step: `step(state, batch) -> state`, a training step with a positive learning rate; it may donate `state`.

    Returns:
        `measure(state, batches)` for the initial state and one batch per step.
    """
    quantizers = {
        path: layer.weights
        for path, layer in spec.replacement.quantization.layers.items()
        if layer.weights is not None and layer.layer.is_plain
    }

    def weights_of(state):
        variables = state.variables
        flat: Any = traverse_util.flatten_dict(variables.params, sep='/')
        return {
            path: (
                quantizer,
                variables.quantizers[path]['weights'],
                flat[spec.replacement.quantization.weight_path(path)],
            )
            for path, quantizer in quantizers.items()
        }

    @jax.jit
    def watch(state, trackers):
        return {
            path: track(trackers[path], quantizer.encode(own, kernel), MOMENTUM, jnp.inf)
            for path, (quantizer, own, kernel) in weights_of(state).items()
        }

    def measure(state, batches):
        trackers = {path: init_tracker(*arguments) for path, arguments in weights_of(state).items()}
        for batch in batches:
            state = step(state, batch)
            trackers = watch(state, trackers)
        # The frequency is a moving average, so it is positive after the first oscillation.
        shares = jax.device_get({path: jnp.mean(tracker.frequency > 0) for path, tracker in trackers.items()})
        return {path: float(shares[path]) for path in trackers}

    return measure
