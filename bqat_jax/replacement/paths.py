"""Runs the low-precision (LP) backbone, the full-precision (FP) teacher and the mixed-precision (MP) paths.

    h_0 = x,  h_i = Q_i(h_{i-1})                        the LP backbone, once
    g_0 = x,  g_i = F_i(g_{i-1}),  z_F = head_F(g_n)    the teacher, once
    z_Q   = head_Q(h_n)
    z_M   = head_F(B_n(.. B_1(x))),  B_i = Q_i or F_i   an MP model, by the plan's mask

The MP models are those of arXiv 2412.15846; in the form `prefix`, head_F(F_n(.. F_{i+1}(h_i))), those of arXiv
2411.01547. The partner F is frozen: its parameters get no gradient and its batch norms use their stored statistics
(ours), but gradients flow through its blocks into the LP blocks. The stem belongs to block 1 (ours). LP blocks that run
on features other than the backbone's use the statistics of the batch and do not update the stored ones (ours).

Features are shared: a path equals h_i while all its blocks are LP, and g_i while all are FP.
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

# The arrays carried over a cut.
Alive = tuple[jax.Array, ...]
RunBlock = Callable[[int, Alive], Alive]


class Variables(NamedTuple):
    """The arrays of a quantized network; a pytree.

    Attributes:
        params: the network's 'params' collection.
        quantizers: parameters of its quantizers, {layer path: {role: {name: array}}}.
        collections: all other collections by name, {'batch_stats': ...}: variables updated without a gradient, and
            constants.
    """

    params: Any
    quantizers: Any
    collections: Any

    @property
    def of_network(self) -> dict[str, Any]:
        """All collections of the network, including 'params'."""
        return {**self.collections, PARAMS: self.params}


class Outputs(NamedTuple):
    """The results of a network for a batch; a pytree.

    Attributes:
        logits: the outputs, a tree, such as logits (batch, classes); None if nothing reads them.
        features: the output of every block in order, an array or a tuple of arrays.
        alive: the arrays carried over every cut.
    """

    logits: Any
    features: Sequence[Any] = ()
    alive: Sequence[Alive] = ()


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The results of the LP backbone.

    Attributes:
        logits: z_Q, the outputs, such as (batch, classes).
        features: h_1 .. h_n, the outputs of the blocks.
        alive: the arrays carried over every cut.
        collections: all collections except 'params', updated in training.
        run_block: `run_block(number, alive)` runs LP block `number`, above 0, on the arrays that another network
            carries over the cut before it; collections are not updated.
    """

    logits: Any
    features: list[Any]
    alive: list[Alive]
    collections: dict[str, Any]
    run_block: RunBlock


class Features(NamedTuple):
    """The inputs of the MP paths.

    Attributes:
        lp: the arrays that the LP backbone carries over every cut, including h_1 .. h_n.
        fp: the arrays that the partner carries over every cut, including g_1 .. g_n.
        run_block: runs LP blocks on other features, see `Backbone`. `fp` and `run_block` are only read if
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
    """Runs the network with fake-quantized weights and layer inputs; without quantizers this is the FP network.

    Args:
        network: the network, divided into blocks.
        quantization: its quantizers.
        variables: variables of the network and its quantizers.
        inputs: the network's inputs, with examples along the first axis.
        train: True for batch statistics, False for the stored ones.
        context: the quantizers' progress, random key and strengths in training. The network's random streams use the
            key too; without a key they repeat one draw in every call.
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
    """Returns the frozen partner; teacher and paths of one step share it, so that it is traced once.

    Args:
        network: the network, divided into blocks.
        partner: the partner's variables by collection, {'params': ..., 'batch_stats': ...}; they get no gradient.
    """
    return network.bind(jax.lax.stop_gradient(partner), train=False)


def run_teacher(partner: BoundNetwork, inputs: Any) -> Outputs:
    """Returns the partner's outputs z_F and features g_1 .. g_n, without a gradient.

    Args:
        partner: the partner from `bind_partner`.
        inputs: the network's inputs.
    """
    run = partner.run(inputs)
    return jax.lax.stop_gradient(Outputs(run.outputs, run.features, run.alive))


def run_paths(partner: BoundNetwork, plan: Plan, mask: jax.Array, features: Features) -> list[Any]:
    """Returns the outputs of the MP models, one tree each; [] if the plan has none.

    Args:
        partner: the partner from `bind_partner`.
        plan: the plan.
        mask: the plan's draw, bool (paths, blocks).
        features: features of the backbone and, if the plan needs them, of the partner.

    Raises:
        ValueError: if the plan needs features or a function that is missing.
    """
    if plan.num_paths == 0:
        return []
    if plan.needs_partner_features and (not features.fp or features.run_block is None):
        raise ValueError(f'The plan {plan.name!r} runs LP blocks on FP features. Give `fp` and `run_block`.')
    blocks = _Blocks(partner, features)
    if plan.is_drawn:
        return _run_drawn(blocks, plan, mask)
    if all(crossing.can_merge for cut in partner.network.crossings for crossing in cut):
        return _run_merged(blocks, plan)
    return [_run_alone(blocks, model) for model in plan.models]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The blocks of the paths; block indices start at 0."""

    partner: BoundNetwork
    features: Features

    @property
    def network(self) -> BlockNetwork:
        return self.partner.network

    @property
    def count(self) -> int:
        return len(self.network.blocks)

    def lp(self, number: int, alive: Alive) -> Alive:
        assert self.features.run_block is not None  # Checked by `run_paths`.
        return self.features.run_block(number, alive)

    def fp(self, number: int, alive: Alive) -> Alive:
        return self.partner.run_pieces(number, number, alive)

    def head(self, alive: Alive) -> Any:
        return self.partner.run_pieces(self.count, self.count, alive)

    def run(self, block: int, model: Sequence[bool], alive: Alive | None) -> Alive | None:
        """Returns the arrays after a block if they are shared with a network or the block is LP, else None."""
        if all(model[: block + 1]):
            return self.features.lp[block]
        if not any(model[: block + 1]):
            return self.features.fp[block]
        return self.lp(block, alive) if model[block] and alive is not None else None


def _run_alone(blocks: _Blocks, model: Sequence[bool]) -> Any:
    """Runs a single model."""
    alive: Any = None
    for block in range(blocks.count):
        before, alive = alive, blocks.run(block, model, alive)
        alive = blocks.fp(block, before) if alive is None else alive
    return blocks.head(alive)


def _run_merged(blocks: _Blocks, plan: Plan) -> list[Any]:
    """Runs all models of the plan; models in FP blocks run together, so that each FP block runs once.

    Merged paths have their axis after the batch axis, (batch, paths, ...), so that the paths of an example stay on the
    device of the example. LP blocks run separately, because their batch statistics are those of one path. A model that
    returns to an LP block leaves the merged ones.
    """
    alone: dict[int, Any] = dict.fromkeys(range(len(plan.models)))  # model number to its arrays
    order: list[int] = []  # the models that run together
    together: Any = None
    for block in range(blocks.count):
        crossings = blocks.network.crossings[block - 1]  # of the cut before the block
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
    """Returns the arrays of the path at index `place`."""
    return tuple(
        x if crossing.axis is None else jax.lax.index_in_dim(x, place, crossing.axis + 1, keepdims=False)
        for crossing, x in zip(crossings, together, strict=True)
    )


def _join(crossings: Sequence[Crossing], together: Any, joining: Sequence[Alive]) -> Any:
    """Returns merged paths (batch, paths, ...) with single paths (batch, ...) appended; None if there are none."""
    if not joining:
        return together
    joined = []
    for number, crossing in enumerate(crossings):
        if crossing.axis is None:  # Equal for all paths.
            joined.append(joining[0][number])
            continue
        axis = crossing.axis + 1
        parts = [] if together is None else [together[number]]
        parts += [jnp.expand_dims(alive[number], axis) for alive in joining]
        joined.append(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis))
    return tuple(joined)


def _run_together(blocks: _Blocks, piece: int, paths: Any) -> Any:
    """Runs an FP block or the head on paths (batch, paths, ...), with the two axes merged."""
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
    """Runs the paths of the mask one by one; `jax.lax.cond` chooses each block, so that only chosen blocks run.

    The mask is replicated, so all devices take one branch.
    """
    outputs = []
    for path_mask in mask:
        alive = blocks.features.lp[0]  # No choice of the first block reads it.
        for block in range(blocks.count):
            alive = _choose(_choices(blocks, plan, block, path_mask), alive)
        outputs.append(blocks.head(alive))
    return outputs


def _choices(blocks: _Blocks, plan: Plan, block: int, mask: jax.Array) -> list[tuple[Any, Callable]]:
    """Returns the possible (condition, function) pairs of a block; the first condition that holds applies."""
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
    """Returns the names of a block's choices that can occur in the plan."""
    if not plan.models:  # Any mask may occur.
        return {'lp feature', 'fp feature'} | ({'lp', 'fp'} if block else set())
    possible = set()
    for model in plan.models:
        is_first = len(set(model[: block + 1])) == 1
        possible.add(('lp' if model[block] else 'fp') + (' feature' if is_first else ''))
    return possible


def _choose(choices: list[tuple[Any, Callable]], alive: Alive) -> Alive:
    """Runs the first choice whose condition holds, or else the last choice."""
    (condition, run), *others = choices
    return run(alive) if not others else jax.lax.cond(condition, run, lambda alive: _choose(others, alive), alive)
