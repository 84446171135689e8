"""Counts statistics of the inputs of all quantizers while a network runs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.quantizers import Quantizer
from bqat_jax.quantizers.rounding import EVALUATION, Context
from bqat_jax.replacement.block_replacement import BlockReplacement
from bqat_jax.replacement.paths import Variables, run_backbone
from bqat_jax.training.state import floats_of
from bqat_jax.transform import ROLES, LayerQuantizers, Quantization

# float32 arrays by name.
Counts = dict[str, jax.Array]


class Counting(NamedTuple):
    """The statistics of a quantizer's input; both functions must be module-level functions.

    Attributes:
        zeros: `zeros(quantizer)` returns zero counts, float32 arrays.
        count: `count(quantizer, parameters, v)` returns the counts of an input, in the shapes of `zeros`.
    """

    zeros: Callable[[Quantizer], Counts]
    count: Callable[[Quantizer, Any, jax.Array], Counts]


def no_errors(quantizer: Quantizer) -> Counts:
    """Returns zero counts; see `count_errors`."""
    del quantizer
    return dict.fromkeys(('signal', 'noise', 'clipped', 'values'), jnp.float32(0))


def count_errors(quantizer: Quantizer, parameters: Any, v: jax.Array) -> Counts:
    """Returns scalars: the sums of squares 'signal' and 'noise', and the numbers 'values' and 'clipped'."""
    x, y = v.astype(jnp.float32), quantizer.fake_quantize(parameters, v).astype(jnp.float32)
    return {
        'signal': jnp.sum(x**2),
        'noise': jnp.sum((x - y) ** 2),
        'clipped': jnp.sum(quantizer.clips(parameters, v), dtype=jnp.float32),
        'values': jnp.float32(v.size),
    }


ERRORS = Counting(no_errors, count_errors)


def observe_quantizers(
    replacement: BlockReplacement, variables: Variables, inputs: Any, counting: Counting
) -> dict[str, dict[str, Counts]]:
    """Returns the counts of every quantizer of the LP network in evaluation, by layer and role; to be jitted.

    Counts of stacked layers have the stack's leading axes.

    Args:
        replacement: the network and its quantizers.
        variables: variables of the network.
        inputs: a batch of the network's inputs.
        counting: the statistics to count.
    """
    layers = {
        path: dataclasses.replace(layer, **{role: _Observed(own, counting) for role, own in _roles(layer)})
        for path, layer in replacement.quantization.layers.items()
    }

    def total(probes):
        parameters = {
            path: {role: {'own': own, 'probe': probes[path][role]} for role, own in roles.items()}
            for path, roles in variables.quantizers.items()
        }
        observed = Variables(variables.params, parameters, variables.collections)
        run = run_backbone(replacement.network, Quantization(layers), observed, inputs, train=False)
        return sum((jnp.sum(x.astype(jnp.float32)) for x in floats_of(run.logits)), jnp.float32(0))

    def probe(own, stack):
        return {name: jnp.zeros((*stack, *x.shape), jnp.float32) for name, x in counting.zeros(own.quantizer).items()}

    probes = {
        path: {role: probe(own, layer.layer.stack) for role, own in _roles(layer)} for path, layer in layers.items()
    }
    return jax.grad(total)(probes)


def _roles(layer: LayerQuantizers) -> list[tuple[str, Any]]:
    return [(role, getattr(layer, role)) for role in ROLES if getattr(layer, role) is not None]


@dataclasses.dataclass(frozen=True)
class _Observed:
    """A quantizer that also counts; the counts are the gradient of its parameter `probe`.

    As gradients, they are available inside `nn.scan` and `nn.remat` too.
    """

    quantizer: Quantizer
    counting: Counting

    @property
    def estimator(self):
        return self.quantizer.estimator

    def fake_quantize(self, parameters, v: jax.Array, context: Context = EVALUATION) -> jax.Array:
        del context
        return _observe(self.quantizer, self.counting, parameters['own'], v, parameters['probe'])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _observe(quantizer: Quantizer, counting: Counting, parameters: Any, v: jax.Array, probe: Any) -> jax.Array:
    """Quantizes v; the gradient of `probe` is the counts."""
    del counting, probe
    return quantizer.fake_quantize(parameters, v)


def _observe_forward(quantizer, counting, parameters, v, probe):
    del counting, probe
    return quantizer.fake_quantize(parameters, v), (parameters, v)


def _observe_backward(quantizer, counting, residuals, cotangent):
    parameters, v = residuals
    return jax.tree.map(jnp.zeros_like, parameters), cotangent, counting.count(quantizer, parameters, v)


_observe.defvjp(_observe_forward, _observe_backward)
