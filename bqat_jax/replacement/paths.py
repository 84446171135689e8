"""Runs the low-precision (LP) backbone, the full-precision (FP) teacher and the mixed-precision (MP) paths.

    h_0 = x,  h_i = Q_i(h_{i-1})                        the LP backbone, once
    z_Q   = head_Q(h_n)
    z_F   = head_F(F_n(.. F_1(x)))                      the teacher
    z_Mi  = head_F(F_n(.. F_{i+1}(h_i)))                the MP model with i leading LP blocks

The MP models of arXiv 2412.15846, in the prefix form of arXiv 2411.01547. The partner F is frozen: its parameters get
no gradient and its batch norms use their stored statistics (ours), but gradients travel through its blocks into the LP
blocks. The stem belongs to block 1 and the head to the FP suffix (ours).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.networks.cut import CutNetwork
from bqat_jax.quantization.rounding import EVALUATION, Context
from bqat_jax.quantization.transform import Quantization
from bqat_jax.replacement.plans import Plan


class Backbone(NamedTuple):
    """What a run of the LP backbone gives.

    Attributes:
        logits: z_Q, (batch, classes).
        features: h_1 .. h_n, the output of every block.
        batch_stats: the batch statistics of the whole network, updated in training.
    """

    logits: jax.Array
    features: list[jax.Array]
    batch_stats: Any


def run_backbone(
    network: CutNetwork,
    quantization: Quantization,
    params: Any,
    quantizer_params: Any,
    batch_stats: Any,
    images: jax.Array,
    *,
    train: bool,
    context: Context = EVALUATION,
) -> Backbone:
    """Runs the network with its weights and layer inputs fake-quantized; with no quantizers this is the FP network.

    Args:
        network: the cut network.
        quantization: its quantizers.
        params: the network's parameters.
        quantizer_params: parameters of the quantizers.
        batch_stats: the network's batch statistics.
        images: normalised images, (batch, height, width, channels).
        train: with batch statistics, or else with the stored ones.
        context: of the quantizers: progress, randomness and strengths in training.
    """
    quantized = quantization.quantize_params(quantizer_params, params, context)
    variables = {'params': quantized, 'batch_stats': batch_stats}
    x, features = images, []
    with quantization.quantize_inputs():
        for names in network.segments:
            x, variables['batch_stats'] = network.apply(variables, x, names, train=train, key=context.key)
            features.append(x)
        logits, new_stats = network.apply(variables, x, network.head, train=train, key=context.key)
    return Backbone(logits, features, new_stats)


def run_teacher(network: CutNetwork, partner: Any, images: jax.Array) -> jax.Array:
    """Returns the FP teacher's logits z_F, (batch, classes), without a gradient.

    Args:
        network: the cut network.
        partner: the partner's variables, {'params': ..., 'batch_stats': ...}.
        images: normalised images.
    """
    return jax.lax.stop_gradient(network.apply(partner, images, network.names, train=False)[0])


def run_paths(
    network: CutNetwork, plan: Plan, partner: Any, features: list[jax.Array], mask: jax.Array
) -> jax.Array | None:
    """Returns the logits of the MP models, (paths, batch, classes), or None where the plan has none.

    Args:
        network: the cut network.
        plan: the plan.
        partner: the partner's variables; they get no gradient.
        features: h_1 .. h_n from the LP backbone.
        mask: the plan's draw, bool (paths, blocks).
    """
    if plan.num_paths == 0:
        return None
    partner = jax.lax.stop_gradient(partner)
    return _run_sampled(network, partner, features, mask) if plan.is_sampled else _run_all(network, partner, features)


def _run_all(network: CutNetwork, partner: Any, features: list[jax.Array]) -> jax.Array:
    """All prefixes together, so that each FP block runs once.

    The paths lie side by side behind the batch axis, (batch, paths, ...), and not one after another along it: then an
    example's paths stay on the device that has the example.
    """
    paths = features[0][:, None]
    for block in range(1, len(network.segments)):
        paths = _apply_to_paths(network, partner, paths, network.segments[block])
        if block < len(network.segments) - 1:
            paths = jnp.concatenate([paths, features[block][:, None]], axis=1)
    logits = _apply_to_paths(network, partner, paths, network.head)
    return jnp.swapaxes(logits, 0, 1)


def _apply_to_paths(network: CutNetwork, partner: Any, paths: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Runs FP submodules on an array (batch, paths, ...), with batch and paths merged."""
    batch, count = paths.shape[:2]
    output, _ = network.apply(partner, paths.reshape(batch * count, *paths.shape[2:]), names, train=False)
    return output.reshape(batch, count, *output.shape[1:])


def _run_sampled(network: CutNetwork, partner: Any, features: list[jax.Array], mask: jax.Array) -> jax.Array:
    """Each drawn prefix on its own; per block a `lax.cond`, so that only the branch taken runs.

    While the mask says LP the path takes the stored h_i instead of computing it again. The first block of a prefix
    is always LP and the last always FP, so there is nothing to decide there.
    """
    logits = []
    for path_mask in mask:
        path = features[0]
        for block in range(1, len(network.segments)):

            def run_block(x, names=network.segments[block]):
                return network.apply(partner, x, names, train=False)[0]

            if block == len(network.segments) - 1:
                path = run_block(path)
            else:
                stored = features[block]
                path = jax.lax.cond(path_mask[block], lambda x, stored=stored: stored, run_block, path)
        logits.append(network.apply(partner, path, network.head, train=False)[0])
    return jnp.stack(logits)
