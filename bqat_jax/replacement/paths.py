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

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.quantizers.rounding import EVALUATION, Context
from bqat_jax.replacement.plans import Plan
from bqat_jax.transform import Quantization

RunBlock = Callable[[int, jax.Array], jax.Array]


class Variables(NamedTuple):
    """The arrays of a quantized network; a pytree.

    Attributes:
        params: the network's 'params' collection.
        quantizers: parameters of its quantizers, {layer path: {role: {name: array}}}.
        batch_stats: the network's 'batch_stats' collection; {} if it has none.
    """

    params: Any
    quantizers: Any
    batch_stats: Any


class Outputs(NamedTuple):
    """What a network gives for a batch; a pytree.

    Attributes:
        logits: (batch, classes); None where nothing reads them.
        features: the output of every block, in order.
    """

    logits: jax.Array | None
    features: Sequence[jax.Array] = ()


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


class Features(NamedTuple):
    """What the MP paths start from.

    Attributes:
        lp: h_1 .. h_n, from the LP backbone.
        fp: g_1 .. g_n, from the partner.
        run_block: runs LP blocks on other features, see `Backbone`. It and `fp` are read only if
            `Plan.needs_partner_features`.
    """

    lp: Sequence[jax.Array]
    fp: Sequence[jax.Array] = ()
    run_block: RunBlock | None = None


def run_backbone(
    network: BlockNetwork,
    quantization: Quantization,
    variables: Variables,
    inputs: Any,
    *,
    train: bool,
    context: Context = EVALUATION,
) -> Backbone:
    """Runs the network with its weights and layer inputs fake-quantized; with no quantizers this is the FP network.

    Args:
        network: the network, divided into blocks.
        quantization: its quantizers.
        variables: its arrays and those of its quantizers.
        inputs: as the network takes them, examples along the first axis.
        train: with batch statistics, or else with the stored ones.
        context: of the quantizers: progress, randomness and strengths in training.
    """
    quantized = quantization.quantize_params(variables.quantizers, variables.params, context)

    def run(x, names, batch_stats):
        collections = {'params': quantized, 'batch_stats': batch_stats}
        with quantization.quantize_inputs():
            return network.apply(collections, x, names, train=train, key=context.key)

    x, features, batch_stats = inputs, [], variables.batch_stats
    for names in network.segments:
        x, batch_stats = run(x, names, batch_stats)
        features.append(x)
    logits, batch_stats = run(x, network.head, batch_stats)

    def run_block(number, x):
        return run(x, network.segments[number], variables.batch_stats)[0]

    return Backbone(logits, features, batch_stats, run_block)


def run_teacher(network: BlockNetwork, partner: Any, inputs: Any) -> Outputs:
    """Returns the partner's logits z_F and features g_1 .. g_n, without a gradient.

    Args:
        network: the network, divided into blocks.
        partner: the partner's variables, {'params': ..., 'batch_stats': ...}.
        inputs: as the network takes them.
    """
    x, features = inputs, []
    for names in network.segments:
        x = network.apply(partner, x, names, train=False)[0]
        features.append(x)
    return jax.lax.stop_gradient(Outputs(network.apply(partner, x, network.head, train=False)[0], features))


def run_paths(network: BlockNetwork, plan: Plan, partner: Any, mask: jax.Array, features: Features) -> jax.Array | None:
    """Returns the logits of the MP models, (paths, batch, classes), or None where the plan has none.

    Args:
        network: the network, divided into blocks.
        plan: the plan.
        partner: the partner's variables; they get no gradient.
        mask: the plan's draw, bool (paths, blocks).
        features: of the backbone and, where the plan needs them, of the partner.

    Raises:
        ValueError: if what the plan needs is missing.
    """
    if plan.num_paths == 0:
        return None
    if plan.needs_partner_features and (not features.fp or features.run_block is None):
        raise ValueError(f'The plan {plan.name!r} runs LP blocks on FP features: give `fp` and `run_block`.')
    blocks = _Blocks(network, jax.lax.stop_gradient(partner), features)
    return _run_drawn(blocks, plan, mask) if plan.is_drawn else _run_known(blocks, plan)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What paths are made of; blocks are counted from 0."""

    network: BlockNetwork
    partner: Any
    features: Features

    @property
    def count(self) -> int:
        return len(self.network.segments)

    def lp(self, number: int, x: jax.Array) -> jax.Array:
        assert self.features.run_block is not None  # `run_paths` has seen to it
        return self.features.run_block(number, x)

    def fp(self, number: int, x: jax.Array) -> jax.Array:
        return self.network.apply(self.partner, x, self.network.segments[number], train=False)[0]

    def head(self, x: jax.Array) -> jax.Array:
        return self.network.apply(self.partner, x, self.network.head, train=False)[0]


def _run_known(blocks: _Blocks, plan: Plan) -> jax.Array:
    """All models of the plan; those that have come to FP blocks run together, so that each FP block runs once.

    Such paths lie side by side behind the batch axis, (batch, paths, ...), and not one after another along it: then an
    example's paths stay on the device that has the example. LP blocks cannot run so: their batch statistics are those
    of one path. A model that comes back to an LP block leaves the others.
    """
    alone: dict[int, Any] = dict.fromkeys(range(len(plan.models)))  # model to its features
    order: list[int] = []  # the models that run together
    together: Any = None
    for block in range(blocks.count):
        leaving = [number for number in order if plan.models[number][block]]
        if leaving:
            paths: Any = together
            alone |= {number: paths[:, order.index(number)] for number in leaving}
            together, order = _without(paths, order, leaving)
        joining = []
        for number in alone:
            model = plan.models[number]
            if all(model[: block + 1]):
                alone[number] = blocks.features.lp[block]
            elif not any(model[: block + 1]):
                alone[number] = blocks.features.fp[block]
            elif model[block]:
                alone[number] = blocks.lp(block, alone[number])
            else:
                joining.append(number)
        together = _join(together, [alone.pop(number) for number in joining])
        order += joining
        if together is not None:
            together = _on_paths(lambda x, block=block: blocks.fp(block, x), together)
    order += alone
    logits = _on_paths(blocks.head, _join(together, list(alone.values())))
    return jnp.stack([logits[:, order.index(number)] for number in range(len(order))])


def _without(together: jax.Array, order: list[int], leaving: list[int]) -> tuple[jax.Array | None, list[int]]:
    """Paths (batch, paths, ...) and their numbers without those that leave."""
    stays = [number for number in order if number not in leaving]
    kept = [together[:, order.index(number)] for number in stays]
    return jnp.stack(kept, axis=1) if kept else None, stays


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
        x = blocks.features.lp[0]  # the first block reads the images, which no choice needs
        for block in range(blocks.count):
            x = _choose(_choices(blocks, plan, block, path_mask), x)
        logits.append(blocks.head(x))
    return jnp.stack(logits)


def _choices(blocks: _Blocks, plan: Plan, block: int, mask: jax.Array) -> list[tuple[Any, Callable]]:
    """What a block may do, each with the condition on which it does, if no earlier one holds."""
    before, here = mask[:block], mask[block]
    choices = {
        'lp feature': (jnp.all(before) & here, lambda x: blocks.features.lp[block]),
        'fp feature': (~jnp.any(before) & ~here, lambda x: blocks.features.fp[block]),
        'lp': (here, lambda x: blocks.lp(block, x)),
        'fp': (~here, lambda x: blocks.fp(block, x)),
    }
    possible = _possible(plan, block)
    return [choice for name, choice in choices.items() if name in possible]


def _possible(plan: Plan, block: int) -> set[str]:
    """Which choices of a block the plan can come to."""
    if not plan.models:  # any mask
        return {'lp feature', 'fp feature'} | ({'lp', 'fp'} if block else set())
    possible = set()
    for model in plan.models:
        is_first = len(set(model[: block + 1])) == 1
        possible.add(('lp' if model[block] else 'fp') + (' feature' if is_first else ''))
    return possible


def _choose(choices: list[tuple[Any, Callable]], x: jax.Array) -> jax.Array:
    """Runs the first choice whose condition holds; the last one needs none."""
    (condition, run), *others = choices
    return run(x) if not others else jax.lax.cond(condition, run, lambda x: _choose(others, x), x)
