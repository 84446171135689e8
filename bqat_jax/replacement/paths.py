"""Runs the low-precision (LP) backbone, the full-precision (FP) teacher and the mixed-precision (MP) paths.

    h_0 = x,  h_i = Q_i(h_{i-1})                        the LP backbone, once
    g_0 = x,  g_i = F_i(g_{i-1}),  z_F = head_F(g_n)    the teacher, once
    z_Q   = head_Q(h_n)
    z_M   = head_F(B_n(.. B_1(x))),  B_i = Q_i or F_i   an MP model, as the plan's mask says

The MP models are those of arXiv 2412.15846; in the form `prefix`, head_F(F_n(.. F_{i+1}(h_i))), those of arXiv
2411.01547. The partner F is frozen: its parameters get no gradient and its batch norms use their stored statistics
(ours), but gradients travel through its blocks into the LP blocks. The stem belongs to block 1 (ours). LP blocks that
run on other features than the backbone's use the statistics of the batch and leave the stored ones alone (ours).

Nothing is computed twice: as long as all blocks of a path are LP it is h_i, and as long as all are FP it is g_i.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import CutNetwork
from bqat_jax.quantizers.rounding import EVALUATION, Context
from bqat_jax.replacement.plans import Plan
from bqat_jax.transform import Quantization

RunBlock = Callable[[int, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What a run of the LP backbone gives.

    Attributes:
        logits: z_Q, (batch, classes).
        features: h_1 .. h_n, the output of every block.
        batch_stats: the batch statistics of the whole network, updated in training.
        run_block: `run_block(number, x)` runs LP block `number`, counted from 0, on other features; batch statistics
            stay as they are.
    """

    logits: jax.Array
    features: list[jax.Array]
    batch_stats: Any
    run_block: RunBlock


class Teacher(NamedTuple):
    """What a run of the partner gives; none of it has a gradient.

    Attributes:
        logits: z_F, (batch, classes); None where nothing reads them.
        features: g_1 .. g_n, the output of every block.
    """

    logits: jax.Array | None
    features: list[jax.Array]


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
    stored = batch_stats

    def run(x, names, batch_stats):
        variables = {'params': quantized, 'batch_stats': batch_stats}
        with quantization.quantize_inputs():
            return network.apply(variables, x, names, train=train, key=context.key)

    x, features = images, []
    for names in network.segments:
        x, batch_stats = run(x, names, batch_stats)
        features.append(x)
    logits, batch_stats = run(x, network.head, batch_stats)
    return Backbone(logits, features, batch_stats, lambda number, x: run(x, network.segments[number], stored)[0])


def run_teacher(network: CutNetwork, partner: Any, images: jax.Array) -> Teacher:
    """Returns the partner's logits and features, without a gradient.

    Args:
        network: the cut network.
        partner: the partner's variables, {'params': ..., 'batch_stats': ...}.
        images: normalised images.
    """
    x, features = images, []
    for names in network.segments:
        x = network.apply(partner, x, names, train=False)[0]
        features.append(x)
    return jax.lax.stop_gradient(Teacher(network.apply(partner, x, network.head, train=False)[0], features))


def run_paths(
    network: CutNetwork,
    plan: Plan,
    partner: Any,
    features: Sequence[jax.Array],
    mask: jax.Array,
    *,
    partner_features: Sequence[jax.Array] | None = None,
    run_block: RunBlock | None = None,
) -> jax.Array | None:
    """Returns the logits of the MP models, (paths, batch, classes), or None where the plan has none.

    Args:
        network: the cut network.
        plan: the plan.
        partner: the partner's variables; they get no gradient.
        features: h_1 .. h_n from the LP backbone.
        mask: the plan's draw, bool (paths, blocks).
        partner_features: g_1 .. g_n from the teacher.
        run_block: runs LP blocks on other features, see `Backbone`. Both are read only if
            `plan.needs_partner_features`.

    Raises:
        ValueError: if what the plan needs is missing.
    """
    if plan.num_paths == 0:
        return None
    if plan.needs_partner_features and (partner_features is None or run_block is None):
        raise ValueError(f'The plan {plan.name!r} runs LP blocks on FP features: give partner_features and run_block.')
    blocks = _Blocks(network, jax.lax.stop_gradient(partner), features, partner_features or (), run_block)
    return _run_drawn(blocks, plan, mask) if plan.is_drawn else _run_known(blocks, plan)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What paths are made of; blocks are counted from 0."""

    network: CutNetwork
    partner: Any
    lp_features: Sequence[jax.Array]
    fp_features: Sequence[jax.Array]
    run_lp: RunBlock | None

    @property
    def count(self) -> int:
        return len(self.network.segments)

    def lp(self, number: int, x: jax.Array) -> jax.Array:
        assert self.run_lp is not None  # `run_paths` has seen to it
        return self.run_lp(number, x)

    def fp(self, number: int, x: jax.Array) -> jax.Array:
        return self.network.apply(self.partner, x, self.network.segments[number], train=False)[0]

    def head(self, x: jax.Array) -> jax.Array:
        return self.network.apply(self.partner, x, self.network.head, train=False)[0]


def _run_known(blocks: _Blocks, plan: Plan) -> jax.Array:
    """All models of the plan; those that have come back to FP blocks run together, so that each block runs once.

    Such paths lie side by side behind the batch axis, (batch, paths, ...), and not one after another along it: then an
    example's paths stay on the device that has the example. LP blocks cannot run so: their batch statistics are those
    of one path.
    """
    alone: dict[int, Any] = dict.fromkeys(range(len(plan.models)))  # model to its features
    order: list[int] = []  # the models that run together
    together: Any = None
    for block in range(blocks.count):
        joining = []
        for number in alone:
            model = plan.models[number]
            if all(model[: block + 1]):
                alone[number] = blocks.lp_features[block]
            elif not any(model[: block + 1]):
                alone[number] = blocks.fp_features[block]
            elif model[block]:
                alone[number] = blocks.lp(block, alone[number])
            else:
                joining.append(number)
        together = _join(together, [alone.pop(number) for number in joining])
        order += joining
        if together is not None:
            together = _on_paths(lambda x, block=block: blocks.fp(block, x), together)
    # No known model leaves the partner twice, so who has joined stays to the end.
    order += alone
    logits = _on_paths(blocks.head, _join(together, list(alone.values())))
    return jnp.stack([logits[:, order.index(number)] for number in range(len(order))])


def _join(together: jax.Array | None, joining: list[jax.Array]) -> jax.Array | None:
    """Puts paths (batch, ...) beside those that run together, (batch, paths, ...)."""
    parts = ([] if together is None else [together]) + [x[:, None] for x in joining]
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _on_paths(function: Callable[[jax.Array], jax.Array], paths: Any) -> jax.Array:
    """Runs a function on an array (batch, paths, ...), with batch and paths merged."""
    batch, count = paths.shape[:2]
    output = function(paths.reshape(batch * count, *paths.shape[2:]))
    return output.reshape(batch, count, *output.shape[1:])


def _run_drawn(blocks: _Blocks, plan: Plan, mask: jax.Array) -> jax.Array:
    """The paths of the mask one by one, each block chosen by `jax.lax.cond`, so that only what is taken runs.

    The mask lies on every device, so all of them take the same branch.
    """
    logits = []
    for path_mask in mask:
        x = blocks.lp_features[0]  # the first block reads the images, which no choice needs
        for block in range(blocks.count):
            x = _choose(_choices(blocks, plan, block, path_mask), x)
        logits.append(blocks.head(x))
    return jnp.stack(logits)


def _choices(blocks: _Blocks, plan: Plan, block: int, mask: jax.Array) -> list[tuple[Any, Callable]]:
    """What a block may do, each with the condition on which it does, if no earlier one holds."""
    before, here = mask[:block], mask[block]
    choices = {
        'lp feature': (jnp.all(before) & here, lambda x: blocks.lp_features[block]),
        'fp feature': (~jnp.any(before) & ~here, lambda x: blocks.fp_features[block]),
        'lp': (here, lambda x: blocks.lp(block, x)),
        'fp': (~here, lambda x: blocks.fp(block, x)),
    }
    possible = _possible(plan, block)
    return [choice for name, choice in choices.items() if name in possible]


def _possible(plan: Plan, block: int) -> set[str]:
    """Which choices of a block the plan can come to."""
    if not plan.models:  # any mask
        return {'lp feature', 'fp feature'} | ({'lp', 'fp'} if block else set())
    found = set()
    for model in plan.models:
        is_first = len(set(model[: block + 1])) == 1
        found.add(('lp' if model[block] else 'fp') + (' feature' if is_first else ''))
    return found


def _choose(choices: list[tuple[Any, Callable]], x: jax.Array) -> jax.Array:
    """Runs the first choice whose condition holds; the last one needs none."""
    (condition, run), *others = choices
    return run(x) if not others else jax.lax.cond(condition, run, lambda x: _choose(others, x), x)
