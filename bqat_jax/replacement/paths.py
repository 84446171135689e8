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

from bqat_jax.blocks.block_network import PARAMS, BlockNetwork, BoundNetwork, Crossing
from bqat_jax.quantizers.rounding import EVALUATION, Context
from bqat_jax.replacement.plans import Plan
from bqat_jax.transform import Quantization

# What is carried over a cut: arrays.
Alive = tuple[jax.Array, ...]
RunBlock = Callable[[int, Alive], Alive]


class Variables(NamedTuple):
    """The arrays of a quantized network; a pytree.

    Attributes:
        params: the network's 'params' collection.
        quantizers: parameters of its quantizers, {layer path: {role: {name: array}}}.
        collections: all other collections by name, {'batch_stats': ...}: what training changes without a gradient, and
            constants.
    """

    params: Any
    quantizers: Any
    collections: Any

    @property
    def of_network(self) -> dict[str, Any]:
        """All collections of the network, 'params' too."""
        return {**self.collections, PARAMS: self.params}


class Outputs(NamedTuple):
    """What a network gives for a batch; a pytree.

    Attributes:
        logits: its outputs, a tree, such as logits (batch, classes); None where nothing reads them.
        features: what the end of every block gives, an array or a tuple of arrays, in order.
        alive: what is carried over every cut.
    """

    logits: Any
    features: Sequence[Any] = ()
    alive: Sequence[Alive] = ()


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What a run of the LP backbone gives.

    Attributes:
        logits: z_Q, the outputs, such as (batch, classes).
        features: h_1 .. h_n, what the end of every block gives.
        alive: what is carried over every cut.
        collections: all collections but 'params', updated in training.
        run_block: `run_block(number, alive)` runs LP block `number`, above 0, on what another network carries over the
            cut before it; the collections stay as they are.
    """

    logits: Any
    features: list[Any]
    alive: list[Alive]
    collections: dict[str, Any]
    run_block: RunBlock


class Features(NamedTuple):
    """What the MP paths start from.

    Attributes:
        lp: what the LP backbone carries over every cut, h_1 .. h_n and what passes by.
        fp: what the partner carries, g_1 .. g_n and what passes by.
        run_block: runs LP blocks on other features, see `Backbone`. It and `fp` are read only if
            `Plan.needs_partner_features`.
    """

    lp: Sequence[Alive]
    fp: Sequence[Alive] = ()
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
        context: of the quantizers: progress, randomness and strengths in training. Its key is that of the network's
            random streams too; without one they draw the same in every call.
    """
    quantized = quantization.quantize_params(variables.quantizers, variables.params, context)
    key = jax.random.key(0) if train and context.key is None and network.streams else context.key
    carried, within = {**variables.collections, PARAMS: quantized}, quantization.quantize_inputs
    bound = network.bind(carried, train=train, key=key, within=within)
    run = bound.run(inputs)

    def run_block(number, alive):
        return bound.run_pieces(number, number, alive)

    return Backbone(run.outputs, run.features, run.alive, {**variables.collections, **run.state}, run_block)


def bind_partner(network: BlockNetwork, partner: Any) -> BoundNetwork:
    """Returns the partner, frozen; teacher and paths of one step share it, so that it is traced once.

    Args:
        network: the network, divided into blocks.
        partner: the partner's variables by collection, {'params': ..., 'batch_stats': ...}; they get no gradient.
    """
    return network.bind(jax.lax.stop_gradient(partner), train=False)


def run_teacher(partner: BoundNetwork, inputs: Any) -> Outputs:
    """Returns the partner's outputs z_F and features g_1 .. g_n, without a gradient.

    Args:
        partner: what `bind_partner` returns.
        inputs: as the network takes them.
    """
    run = partner.run(inputs)
    return jax.lax.stop_gradient(Outputs(run.outputs, run.features, run.alive))


def run_paths(partner: BoundNetwork, plan: Plan, mask: jax.Array, features: Features) -> list[Any]:
    """Returns the outputs of the MP models, a tree for each; [] where the plan has none.

    Args:
        partner: what `bind_partner` returns.
        plan: the plan.
        mask: the plan's draw, bool (paths, blocks).
        features: of the backbone and, where the plan needs them, of the partner.

    Raises:
        ValueError: if what the plan needs is missing.
    """
    if plan.num_paths == 0:
        return []
    if plan.needs_partner_features and (not features.fp or features.run_block is None):
        raise ValueError(f'The plan {plan.name!r} runs LP blocks on FP features: give `fp` and `run_block`.')
    blocks = _Blocks(partner, features)
    if plan.is_drawn:
        return _run_drawn(blocks, plan, mask)
    if all(crossing.can_merge for cut in partner.network.crossings for crossing in cut):
        return _run_merged(blocks, plan)
    return [_run_alone(blocks, model) for model in plan.models]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """What paths are made of; blocks are counted from 0."""

    partner: BoundNetwork
    features: Features

    @property
    def network(self) -> BlockNetwork:
        return self.partner.network

    @property
    def count(self) -> int:
        return len(self.network.blocks)

    def lp(self, number: int, alive: Alive) -> Alive:
        assert self.features.run_block is not None  # `run_paths` has seen to it
        return self.features.run_block(number, alive)

    def fp(self, number: int, alive: Alive) -> Alive:
        return self.partner.run_pieces(number, number, alive)

    def head(self, alive: Alive) -> Any:
        return self.partner.run_pieces(self.count, self.count, alive)

    def run(self, block: int, model: Sequence[bool], alive: Alive | None) -> Alive | None:
        """What a model carries over the cut behind a block where it takes it from a network or runs LP, else None."""
        if all(model[: block + 1]):
            return self.features.lp[block]
        if not any(model[: block + 1]):
            return self.features.fp[block]
        return self.lp(block, alive) if model[block] and alive is not None else None


def _run_alone(blocks: _Blocks, model: Sequence[bool]) -> Any:
    """A model by itself."""
    alive: Any = None
    for block in range(blocks.count):
        before, alive = alive, blocks.run(block, model, alive)
        alive = blocks.fp(block, before) if alive is None else alive
    return blocks.head(alive)


def _run_merged(blocks: _Blocks, plan: Plan) -> list[Any]:
    """All models of the plan; those that have come to FP blocks run together, so that each FP block runs once.

    Such paths lie side by side behind the batch axis, (batch, paths, ...), and not one after another along it: then an
    example's paths stay on the device that has the example. LP blocks cannot run so: their batch statistics are those
    of one path. A model that comes back to an LP block leaves the others.
    """
    alone: dict[int, Any] = dict.fromkeys(range(len(plan.models)))  # model to what it carries
    order: list[int] = []  # the models that run together
    together: Any = None
    for block in range(blocks.count):
        crossings = blocks.network.crossings[block - 1]  # of the cut before it
        leaving = [number for number in order if plan.models[number][block]]
        if leaving:
            alone |= {number: _take(crossings, together, order.index(number)) for number in leaving}
            stays = [number for number in order if number not in leaving]
            kept = [_take(crossings, together, order.index(number)) for number in stays]
            together, order = _join(crossings, None, kept), stays
        joining = {}
        for number, before in list(alone.items()):
            after = blocks.run(block, plan.models[number], before)
            if after is None:
                joining[number] = alone.pop(number)
            else:
                alone[number] = after
        together = _join(crossings, together, list(joining.values()))
        order += joining
        if together is not None:
            together = _run_together(blocks, block, together)
    order += alone
    last = blocks.network.crossings[blocks.count - 1]
    together = _join(last, together, list(alone.values()))
    outputs = _run_together(blocks, blocks.count, together)
    leaves, structure = jax.tree.flatten(outputs)
    crossings = blocks.network.crossings[-1]
    return [
        jax.tree.unflatten(structure, _take(crossings, leaves, order.index(number))) for number in range(len(order))
    ]


def _take(crossings: Sequence[Crossing], together: Any, place: int) -> Any:
    """What the path at `place` carries."""
    return tuple(
        x if crossing.axis is None else jax.lax.index_in_dim(x, place, crossing.axis + 1, keepdims=False)
        for crossing, x in zip(crossings, together, strict=True)
    )


def _join(crossings: Sequence[Crossing], together: Any, joining: Sequence[Alive]) -> Any:
    """Puts paths (batch, ...) beside those that run together, (batch, paths, ...); None if there are none."""
    if not joining:
        return together
    joined = []
    for number, crossing in enumerate(crossings):
        if crossing.axis is None:  # the same for all
            joined.append(joining[0][number])
            continue
        axis = crossing.axis + 1
        parts = [] if together is None else [together[number]]
        parts += [jnp.expand_dims(alive[number], axis) for alive in joining]
        joined.append(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis))
    return tuple(joined)


def _run_together(blocks: _Blocks, piece: int, paths: Any) -> Any:
    """Runs an FP block, or the head, on paths (batch, paths, ...), with batch and paths merged."""
    before, after = blocks.network.crossings[piece - 1], blocks.network.crossings[piece]
    count = next((x.shape[c.axis + 1] for c, x in zip(before, paths, strict=True) if isinstance(c.axis, int)), 1)

    def merge(crossing, x):
        axis = crossing.axis
        return x if axis is None else x.reshape(*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 2 :])

    def divide(crossing, x):
        axis = crossing.axis
        return x if axis is None else x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])

    merged = tuple(merge(crossing, x) for crossing, x in zip(before, paths, strict=True))
    result = blocks.head(merged) if piece == blocks.count else blocks.fp(piece, merged)
    leaves, structure = jax.tree.flatten(result)
    return jax.tree.unflatten(structure, [divide(crossing, x) for crossing, x in zip(after, leaves, strict=True)])


def _run_drawn(blocks: _Blocks, plan: Plan, mask: jax.Array) -> list[Any]:
    """The paths of the mask one by one, each block chosen by `jax.lax.cond`, so that only what is taken runs.

    The mask lies on every device, so all of them take the same branch.
    """
    outputs = []
    for path_mask in mask:
        alive = blocks.features.lp[0]  # what no choice of the first block needs
        for block in range(blocks.count):
            alive = _choose(_choices(blocks, plan, block, path_mask), alive)
        outputs.append(blocks.head(alive))
    return outputs


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


def _choose(choices: list[tuple[Any, Callable]], alive: Alive) -> Alive:
    """Runs the first choice whose condition holds; the last one needs none."""
    (condition, run), *others = choices
    return run(alive) if not others else jax.lax.cond(condition, run, lambda alive: _choose(others, alive), alive)
