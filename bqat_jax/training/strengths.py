"""The strength δ of element-wise gradient scaling, from the loss's curvature (EWGS, arXiv 2104.00903).

    δ = max(0, (Tr(H) / N) / (3 · std(g)))

for every quantizer whose estimator needs it. H and g are the Hessian and the gradient of the loss with respect to the
quantizer's normalized output, N is its number of elements. The quotient is averaged over some batches and the mean is
clipped at zero once, as in the authors' code (cvlab-yonsei/EWGS). The trace is Hutchinson's estimate.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.distributed.replicas import Replicas
from bqat_jax.quantizers import Quantizer
from bqat_jax.quantizers.rounding import EVALUATION, Context
from bqat_jax.training.loss import total_loss
from bqat_jax.training.spec import NO_REGULARIZERS, TrainSpec
from bqat_jax.training.state import TrainState
from bqat_jax.training.step import prepare_batch
from bqat_jax.transform import Quantization, find_layers

# Separates the randomness of a measurement from that of the step with that key.
MEASUREMENT = 1
# Gradients with a smaller deviation give a strength of 0.
SMALLEST_DEVIATION = 1e-12


@dataclasses.dataclass(frozen=True)
class TraceSettings:
    """Settings of the trace estimate; the defaults are the paper's.

    Attributes:
        batches: number of batches over which δ is averaged.
        iterations: largest number of random vectors.
        tolerance: drawing stops when every mean changes by less than this, relatively.

    Raises:
        ValueError: for a value out of range.
    """

    batches: int = 3
    iterations: int = 50
    tolerance: float = 1e-3

    def __post_init__(self):
        for name, least in (('batches', 1), ('iterations', 2), ('tolerance', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'quant.trace.{name}={getattr(self, name)}: must be at least {least}.')


class Trace(NamedTuple):
    """Estimates of traces, in trees of scalars.

    Attributes:
        mean: the estimates.
        standard_error: standard error of the mean over random vectors; mean ± 1.96 · standard_error is the 95 %
            confidence interval.
        iterations: number of random vectors drawn.
    """

    mean: Any
    standard_error: Any
    iterations: jax.Array


def hutchinson_traces(
    gradient: Callable[[Any], Any], at: Any, key: jax.Array, iterations: int, tolerance: float
) -> Trace:
    """Estimates the traces of the diagonal blocks of a Hessian, one per leaf (Hutchinson 1990).

    With entries of v drawn from ±1, the mean of vᵀHv is the trace. All blocks share the random vectors: off-diagonal
    blocks only add variance. At least two vectors are drawn; drawing stops when every mean changes by less than
    `tolerance` of its magnitude (the authors' code omits the magnitude, and so stops immediately for negative traces).

    Args:
        gradient: gradient of a scalar function, from a tree to a tree of equal structure.
        at: the point, a tree of float32 arrays.
        key: random key.
        iterations: largest number of random vectors, at least 2.
        tolerance: relative change at which drawing stops; 0 draws all vectors.
    """

    def product(vectors):
        def along(x):
            parts = jax.tree.map(lambda g, v: jnp.sum(g * v), gradient(x), vectors)
            return sum(jax.tree.leaves(parts), jnp.float32(0))

        # Reverse over reverse, because estimators define no forward-mode derivative.
        return jax.grad(along)(at)

    leaves, treedef = jax.tree.flatten(at)

    def draw(number):
        keys = jax.random.split(jax.random.fold_in(key, number), len(leaves))
        vectors = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        products = jax.tree.leaves(product(treedef.unflatten(vectors)))
        return jnp.stack([jnp.sum(v * p) for v, p in zip(vectors, products, strict=True)])

    def proceed(carry):
        count, _, _, change = carry
        return (count < iterations) & ((count < 2) | (change > tolerance))

    def step(carry):
        # Welford's running mean and sum of squared deviations.
        count, mean, squares, _ = carry
        sample = draw(count)
        count += 1
        new = mean + (sample - mean) / count.astype(jnp.float32)
        squares += (sample - mean) * (sample - new)
        change = jnp.max(jnp.abs(new - mean) / (jnp.abs(new) + 1e-6))
        return count, new, squares, change

    zeros = jnp.zeros(len(leaves), jnp.float32)
    count, mean, squares, _ = jax.lax.while_loop(proceed, step, (jnp.int32(0), zeros, zeros, jnp.float32(jnp.inf)))
    drawn = count.astype(jnp.float32)
    error = jnp.sqrt(squares / (drawn - 1) / drawn)
    return Trace(treedef.unflatten(list(mean)), treedef.unflatten(list(error)), count)


def measure_strengths(
    quantization: Quantization,
    quantizer_params: Any,
    shapes: dict[str, dict[str, tuple[int, ...]]],
    loss: Callable[[Quantization, Any], jax.Array],
    key: jax.Array,
    settings: TraceSettings,
) -> dict[str, dict[str, jax.Array]]:
    """Returns δ of one batch, which may be negative, for every quantizer whose estimator needs one.

    `mean_strengths` averages the result over batches.

    Args:
        quantization: the network's quantizers.
        quantizer_params: parameters of the quantizers.
        shapes: {layer path: {role: shape of the quantizer's input}} for these quantizers.
        loss: `loss(quantization, quantizer_params)` runs the network on the batch and returns a scalar.
        key: random key.
        settings: settings of the estimate.
    """
    perturbed = perturb(quantization, shapes)
    zeros = {
        path: {role: jnp.zeros(shape, jnp.float32) for role, shape in roles.items()} for path, roles in shapes.items()
    }

    def perturbed_loss(perturbations):
        return loss(perturbed, with_perturbations(quantizer_params, perturbations))

    gradient = jax.grad(perturbed_loss)
    trace = hutchinson_traces(gradient, zeros, key, settings.iterations, settings.tolerance)

    def delta(trace, gradient):
        deviation = jnp.std(gradient)
        strength = trace / gradient.size / (3 * jnp.maximum(deviation, SMALLEST_DEVIATION))
        return jnp.where(deviation > SMALLEST_DEVIATION, strength, 0.0)

    return jax.tree.map(delta, trace.mean, gradient(zeros))


def mean_strengths(of_batches: Sequence[Any]) -> Any:
    """Returns δ: the mean over batches, at least zero.

    Args:
        of_batches: trees from `measure_strengths`, at least one.
    """
    return jax.tree.map(lambda *values: jnp.maximum(sum(values[1:], values[0]) / len(values), 0.0), *of_batches)


@dataclasses.dataclass(frozen=True)
class _Perturbed:
    """A quantizer with a perturbation of its output, in units of the distance from the lowest to the highest level."""

    quantizer: Quantizer

    @property
    def estimator(self):
        return self.quantizer.estimator

    def fake_quantize(self, parameters, v: jax.Array, context: Context = EVALUATION) -> jax.Array:
        own = parameters['quantizer']
        lowest, highest = jax.lax.stop_gradient(self.quantizer.limits(self.quantizer.prepare(own, v), v.ndim))
        y = self.quantizer.fake_quantize(own, v, context)
        return y + ((highest - lowest) * parameters['perturbation']).astype(y.dtype)


def perturb(quantization: Quantization, shapes: dict[str, Any]) -> Quantization:
    """Returns quantizers of which those in `shapes` accept a perturbation; see `with_perturbations`."""
    layers = dict(quantization.layers)
    for path, roles in shapes.items():
        layers[path] = dataclasses.replace(
            layers[path], **{role: _Perturbed(getattr(layers[path], role)) for role in roles}
        )
    return Quantization(layers)


def with_perturbations(quantizer_params: Any, perturbations: Any) -> Any:
    """Returns parameters for `perturb`ed quantizers."""
    return {
        path: {
            role: {'quantizer': own, 'perturbation': perturbations[path][role]}
            if role in perturbations.get(path, {})
            else own
            for role, own in roles.items()
        }
        for path, roles in quantizer_params.items()
    }


def make_measurement(spec: TrainSpec, settings: TraceSettings, replicas: Replicas) -> Callable[..., Any]:
    """Returns the jitted `measure(state, partner, arrays, batch, number)`: δ of one batch, structured like the state's.

    `number` is the batch's index in the measurement. The loss is the full training loss on the batch as prepared for
    training, without dampening, which does not depend on the outputs of quantizers.
    """
    undampened = dataclasses.replace(spec, regularizers=NO_REGULARIZERS)

    def measure(state: TrainState, partner: Any, arrays: Any, batch: Any, number: jax.Array, draw: Any) -> Any:
        state = dataclasses.replace(state, step=state.step + number)
        prepared, loss_key = prepare_batch(spec, state, arrays, batch)
        variables, network = state.variables, spec.replacement.network
        context = Context(spec.progress(state.step), loss_key, state.strengths)

        def loss(quantization, quantizer_params):
            replacement = dataclasses.replace(spec.replacement, quantization=quantization)
            perturbed = dataclasses.replace(undampened, replacement=replacement)
            return total_loss(
                perturbed, variables._replace(quantizers=quantizer_params), partner, prepared, context, draw
            )[0]

        run = network.as_function(variables.collections, train=False)
        layers = find_layers(run, variables.params, prepared.inputs).quantizable
        seen = {path: {'weights': layer.weights, 'activations': layer.input.shape} for path, layer in layers.items()}
        shapes = {path: {role: seen[path][role] for role in roles} for path, roles in state.strengths.items()}
        key = jax.random.fold_in(loss_key, MEASUREMENT)
        return measure_strengths(spec.replacement.quantization, variables.quantizers, shapes, loss, key, settings)

    of_all = replicas.over(measure, (0, None, None, 0, None, None))

    def measure_all(state, partner, arrays, batch, number):
        draw = spec.draw(state.step.reshape(-1)[0] + number)
        return of_all(state, partner, arrays, batch, number, draw)

    return replicas.jit(measure_all, (0, None, None, 0, None))
