"""Measures a low-precision network at one moment of its training.

Gradients are with respect to the weights that training updates, on training images without augmentation. The pseudo-
gradient of the quantized network's loss is compared with two that are meant to be truer:

    full precision  the gradient of the same loss at the same weights, with no quantizer anywhere
    smoothed        the gradient of the loss averaged over perturbed weights: every weight is rounded up or down at
                    random, so that it keeps its value in the mean, and the straight-through gradients of K draws are
                    averaged. Averaged over draws, the loss is a smooth function of the weights.

Both choices are ours; arXiv 2412.15846 claims truer gradients and does not, in what we could read, say against what.
"""

import dataclasses
import functools
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
from bqat_jax.quantizers import Quantizer
from bqat_jax.quantizers.estimators import get_estimator
from bqat_jax.quantizers.oscillations import init_tracker, track
from bqat_jax.quantizers.rounding import EVALUATION, Context
from bqat_jax.replacement.objective import cross_entropy
from bqat_jax.replacement.paths import run_backbone, run_teacher
from bqat_jax.training.optimizer import NETWORK, QUANTIZERS
from bqat_jax.training.step import Problem, TrainState
from bqat_jax.transform import FULL_PRECISION, ROLES, WEIGHT_NAME, LayerQuantizers, Quantization

LOSSES = ('lp', 'full')
REFERENCES = ('full_precision', 'smoothed')
# What is counted at a quantizer.
COUNTS = ('signal', 'noise', 'clipped', 'values')
# Of the average that notes oscillations.
MOMENTUM = 0.01


@dataclasses.dataclass(frozen=True)
class DiagnosisSettings:
    """How much is measured.

    Attributes:
        batches: of training images.
        samples: K, draws of perturbed weights for the smoothed gradient.
        oscillation_steps: training steps during which weights are watched; 0 for none.

    Raises:
        ValueError: for fewer than two batches, or one sample.
    """

    batches: int
    samples: int
    oscillation_steps: int

    def __post_init__(self):
        for name, least in (('batches', 2), ('samples', 1), ('oscillation_steps', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'diagnosis.{name}={getattr(self, name)}: it must be at least {least}.')


def measure_gradients(
    problem: Problem,
    state: TrainState,
    partner: Any,
    batches: Iterable[tuple[jax.Array, jax.Array]],
    blocks: Mapping[str, str],
    samples: int,
) -> dict[str, Any]:
    """Compares pseudo-gradients with their references, and measures how much they differ from batch to batch.

    Args:
        problem: what is trained.
        state: of one network.
        partner: the partner's variables.
        batches: normalised images and labels.
        blocks: layer path to the name of its block.
        samples: K.

    Returns:
        {loss: {'layers': {path: measures}, 'blocks': {block: measures}}} for the losses 'lp' (the labels' cross entropy
        of the LP network alone) and 'full' (the whole objective), with the measures 'cosine_to_*' and
        'relative_norm_to_*', the mean over batches, and 'variance': the mean squared distance from the mean gradient
        of the batches, divided by that gradient's square.
    """
    quantization = problem.replacement.quantization
    smooth = _with_estimator(quantization, 'stochastic')

    def kernels(gradient):
        flat: Any = traverse_util.flatten_dict(gradient, sep='/')
        return {path: flat[f'{path}/{WEIGHT_NAME}'] for path in blocks}

    def task_gradient(state, quantization, quantizer_params, images, labels, key):
        def loss(params):
            run = run_backbone(
                problem.replacement.network,
                quantization,
                params,
                quantizer_params,
                state.batch_stats,
                images,
                train=True,
                context=Context(problem.progress(state.step), key, state.deltas),
            )
            return cross_entropy(run.logits, labels)

        return kernels(jax.grad(loss)(state.params[NETWORK]))

    def full_gradient(state, partner, images, labels, key, number):
        def loss(params):
            return problem.replacement.loss(
                params,
                state.params[QUANTIZERS],
                state.batch_stats,
                partner,
                images,
                labels,
                key,
                progress=problem.progress(state.step),
                deltas=state.deltas,
                draw=problem.draw(state.step + number),
            )[0]

        return kernels(jax.grad(loss)(state.params[NETWORK]))

    @jax.jit
    def measure(state, partner, images, labels, number):
        key = jax.random.fold_in(state.key, number)
        gradients = {
            'lp': task_gradient(state, quantization, state.params[QUANTIZERS], images, labels, key),
            'full': full_gradient(state, partner, images, labels, key, number),
        }

        def add(total, sample_key):
            drawn = task_gradient(state, smooth, state.params[QUANTIZERS], images, labels, sample_key)
            return jax.tree.map(lambda a, b: a + b / samples, total, drawn), None

        zeros = jax.tree.map(jnp.zeros_like, gradients['lp'])
        references = {
            'full_precision': task_gradient(state, FULL_PRECISION, {}, images, labels, key),
            'smoothed': jax.lax.scan(add, zeros, jax.random.split(key, samples))[0],
        }
        compared = {
            loss: {
                reference: {path: products(gradients[loss][path], references[reference][path]) for path in blocks}
                for reference in REFERENCES
            }
            for loss in LOSSES
        }
        return gradients, compared

    found, total, count = [], None, 0
    for number, (images, labels) in enumerate(batches):
        gradients, compared = measure(state, partner, images, labels, jnp.int32(number))
        total = gradients if total is None else jax.tree.map(jnp.add, total, gradients)
        found.append(jax.device_get(compared))
        count += 1
    mean_squares = jax.device_get(jax.tree.map(lambda x: jnp.sum((x / count) ** 2), total))
    groups: dict[str, dict[str, list[str]]] = {'layers': {path: [path] for path in blocks}, 'blocks': {}}
    for path, block in blocks.items():
        groups['blocks'].setdefault(block, []).append(path)
    return {
        loss: {
            kind: {name: _summarize(loss, found, mean_squares[loss], paths) for name, paths in members.items()}
            for kind, members in groups.items()
        }
        for loss in LOSSES
    }


def _summarize(loss: str, found: list[Any], mean_squares: Mapping[str, Any], paths: list[str]) -> dict[str, float]:
    """The measures of some layers taken together."""
    measures: dict[str, float] = {}
    for reference in REFERENCES:
        merged = [_add([compared[loss][reference][path] for path in paths]) for compared in found]
        measures[f'cosine_to_{reference}'] = float(sum(one.cosine for one in merged) / len(merged))
        measures[f'relative_norm_to_{reference}'] = float(sum(one.relative_norm for one in merged) / len(merged))
    # The sum of squares about the mean is the sum of squares less that of the mean.
    squares = sum(compared[loss][REFERENCES[0]][path].square for compared in found for path in paths)
    mean = sum(mean_squares[path] for path in paths)
    measures['variance'] = float((squares - len(found) * mean) / (len(found) - 1) / max(mean, 1e-30))
    return measures


def _add(parts: list[Products]) -> Products:
    return jax.tree.map(lambda *values: sum(values[1:], values[0]), *parts)


def _with_estimator(quantization: Quantization, name: str) -> Quantization:
    """The quantizers with another estimator for all weights."""
    estimator, layers = get_estimator(name), {}
    for path, layer in quantization.layers.items():
        weights = None if layer.weights is None else dataclasses.replace(layer.weights, estimator=estimator)
        layers[path] = dataclasses.replace(layer, weights=weights)
    return Quantization(layers)


def measure_features(
    problem: Problem, state: TrainState, partner: Any, batches: Iterable[tuple[jax.Array, jax.Array]]
) -> dict[str, dict[str, float]]:
    """Returns 'cka' and 'relative_error' of every LP block's output against the partner's, in evaluation, by block.

    The mean over batches; linear CKA depends on the size of a batch.
    """
    network = problem.replacement.network

    @jax.jit
    def measure(state, partner, images):
        low = run_backbone(
            network,
            problem.replacement.quantization,
            state.params[NETWORK],
            state.params[QUANTIZERS],
            state.batch_stats,
            images,
            train=False,
        )
        full = run_teacher(network, partner, images)
        return [
            {'cka': linear_cka(h, g), 'relative_error': relative_error(h, g)}
            for h, g in zip(low.features, full.features, strict=True)
        ]

    found = [jax.device_get(measure(state, partner, images)) for images, _ in batches]
    mean: Any = jax.tree.map(lambda *values: float(sum(values) / len(values)), *found)
    return {f'block {number}': measures for number, measures in enumerate(mean, 1)}


def measure_quantizers(
    problem: Problem, state: TrainState, batches: Iterable[tuple[jax.Array, jax.Array]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns 'snr' in decibels and 'clipped', a fraction of all values, by layer and role.

    The signal is what arrives at the quantizer in the LP network in evaluation, the noise what quantization changes.
    """
    replacement = problem.replacement
    layers = {
        path: dataclasses.replace(layer, **{role: _Observed(quantizer) for role, quantizer in _roles(layer)})
        for path, layer in replacement.quantization.layers.items()
    }

    @jax.jit
    def look(state, images):
        def total(probes):
            parameters = {
                path: {role: {'own': own, 'probe': probes[path][role]} for role, own in roles.items()}
                for path, roles in state.params[QUANTIZERS].items()
            }
            return jnp.sum(
                run_backbone(
                    replacement.network,
                    Quantization(layers),
                    state.params[NETWORK],
                    parameters,
                    state.batch_stats,
                    images,
                    train=False,
                ).logits
            )

        def probe(stack):
            return dict.fromkeys(COUNTS, jnp.zeros(stack, jnp.float32))

        probes = {path: {role: probe(layer.layer.stack) for role, _ in _roles(layer)} for path, layer in layers.items()}
        return jax.grad(total)(probes)

    found = [jax.device_get(look(state, images)) for images, _ in batches]
    sums = jax.tree.map(lambda *values: sum(value.sum() for value in values), *found)

    def summarize(counts):
        return {
            'snr': float(decibels(counts['signal'], counts['noise'])),
            'clipped': float(counts['clipped'] / counts['values']),
        }

    # In the order of the layers, which a map over trees does not keep.
    return {path: {role: summarize(counts) for role, counts in sums[path].items()} for path in layers}


def _roles(layer: LayerQuantizers) -> list[tuple[str, Any]]:
    return [(role, getattr(layer, role)) for role in ROLES if getattr(layer, role) is not None]


@dataclasses.dataclass(frozen=True)
class _Observed:
    """A quantizer that lets a probe among its parameters receive, as its gradient, what is to be known of its input.

    So it comes out of `nn.scan` and `nn.remat` too; see `bqat_jax.transform.calibration`.
    """

    quantizer: Quantizer

    @property
    def estimator(self):
        return self.quantizer.estimator

    def fake_quantize(self, parameters, v: jax.Array, context: Context = EVALUATION) -> jax.Array:
        del context
        return _observe(self.quantizer, parameters['own'], v, parameters['probe'])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe(quantizer: Quantizer, parameters: Any, v: jax.Array, probe: Any) -> jax.Array:
    """Quantizes v; the gradient of the probe is the counts of `COUNTS`."""
    del probe
    return quantizer.fake_quantize(parameters, v)


def _observe_forward(quantizer, parameters, v, probe):
    del probe
    return quantizer.fake_quantize(parameters, v), (parameters, v)


def _observe_backward(quantizer, residuals, cotangent):
    parameters, v = residuals
    x, y = v.astype(jnp.float32), quantizer.fake_quantize(parameters, v).astype(jnp.float32)
    counts = {
        'signal': jnp.sum(x**2),
        'noise': jnp.sum((x - y) ** 2),
        'clipped': jnp.sum(quantizer.clips(parameters, v), dtype=jnp.float32),
        'values': jnp.float32(v.size),
    }
    return jax.tree.map(jnp.zeros_like, parameters), cotangent, counts


_observe.defvjp(_observe_forward, _observe_backward)


def measure_oscillations(
    problem: Problem,
    step: Callable[..., tuple[TrainState, Any]],
    state: TrainState,
    partner: Any,
    arrays: Any,
    batches: Iterable[Any],
) -> dict[str, float]:
    """Returns, by layer, the fraction of weights whose code went back on its last change at least once.

    Args:
        problem: what is trained.
        step: the training step, with an optimizer that does learn; it must not take its state over.
        state: to begin with; it stays as it is.
        partner: the partner's variables.
        arrays: the split that lives on the device, or None.
        batches: one for each step.
    """
    quantizers = {
        path: layer.weights
        for path, layer in problem.replacement.quantization.layers.items()
        if layer.weights is not None and layer.layer.is_plain
    }

    def weights_of(state):
        flat: Any = traverse_util.flatten_dict(state.params[NETWORK], sep='/')
        parameters = state.params[QUANTIZERS]
        return {
            path: (quantizer, parameters[path]['weights'], flat[f'{path}/{WEIGHT_NAME}'])
            for path, quantizer in quantizers.items()
        }

    @jax.jit
    def watch(state, trackers):
        return {
            path: track(trackers[path], quantizer.encode(own, kernel), MOMENTUM, jnp.inf)
            for path, (quantizer, own, kernel) in weights_of(state).items()
        }

    trackers = {path: init_tracker(*arguments) for path, arguments in weights_of(state).items()}
    for batch in batches:
        state, _ = step(state, partner, arrays, batch)
        trackers = watch(state, trackers)
    # The frequency is a moving average: positive once a weight has oscillated.
    shares = jax.device_get({path: jnp.mean(tracker.frequency > 0) for path, tracker in trackers.items()})
    return {path: float(shares[path]) for path in trackers}
