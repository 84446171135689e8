"""Block replacement as one object: a network, its quantizers, a plan and an objective."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import PARAMS, BlockNetwork, other_collections
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.paths import Features, Outputs, Variables, bind_partner, run_backbone, run_paths, run_teacher
from bqat_jax.replacement.plans import Plan
from bqat_jax.replacement.tasks import Task
from bqat_jax.transform import Quantization, prepare

NO_TEACHER = Outputs(None)


class Batch(NamedTuple):
    """A batch of examples; a pytree.

    Attributes:
        inputs: the network's inputs, with examples along the first axis.
        targets: the task's targets, see `bqat_jax.replacement.task_kinds`; for image classification integer labels
            (batch,).
    """

    inputs: Any
    targets: Any


@dataclasses.dataclass(frozen=True)
class BlockReplacement:
    """The static part of training by block replacement; all arrays are arguments of its methods.

    Attributes:
        network: the network, divided into blocks.
        quantization: its quantizers; empty for full precision.
        plan: the plan of mixed-precision models.
        objective: the objective to minimise.

    Raises:
        ValueError: if the plan is for another number of blocks, or no term of the objective trains the complete LP
            network.
    """

    network: BlockNetwork
    quantization: Quantization
    plan: Plan
    objective: Objective

    def __post_init__(self):
        if self.plan.num_blocks != len(self.network.blocks):
            raise ValueError(
                f'The plan is for {self.plan.num_blocks} blocks, and the network has {len(self.network.blocks)}. Use '
                f'Plan({self.plan.name!r}, {len(self.network.blocks)}).'
            )
        self.objective.check_trains_network(self.plan.num_paths)

    @property
    def task(self) -> Task:
        """The objective's task."""
        return self.objective.task

    @property
    def needs_partner(self) -> bool:
        """Whether the plan or the objective reads the partner's features or logits."""
        return self.objective.needs_teacher(self.plan.num_paths) or self.plan.needs_partner_features

    def loss(
        self,
        variables: Variables,
        partner: Any,
        batch: Batch,
        context: Context,
        draw: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Runs the LP backbone, the teacher and the plan's MP paths once each, and returns the loss.

        Args:
            variables: variables of the LP network and its quantizers.
            partner: the FP partner's variables, {'params': ..., 'batch_stats': ...}, which get no gradient; None if
                neither plan nor objective reads them.
            batch: inputs and targets.
            context: progress for schedules; a random key for the plan, the quantizers and dropout (without a key,
                quantizers round as in evaluation); and strengths for estimators that need them.
            draw: mask and weights of the MP models from `plan.draw`; None draws them from the context's key.

        Returns:
            The loss, a scalar, and a pair: the updated collections, {'batch_stats': ...}, and the metrics.

        Raises:
            ValueError: if the plan draws and both `draw` and the key are missing, or if the partner is needed and None.
        """
        if partner is None and self.needs_partner:
            raise ValueError(
                f'partner=None: the plan {self.plan.name!r} or the objective reads the partner. Give its variables.'
            )
        if context.key is None and self.network.streams and self.network.inputs is not None:
            raise ValueError(
                f'Context(key=None): the network draws in training ({", ".join(self.network.streams)}), and would '
                'repeat one draw in every step. Give a different key in each step.'
            )
        plan_key, key = (None, None) if context.key is None else jax.random.split(context.key)
        if draw is None:
            draw = self.plan.draw(plan_key, context.progress)
        mask, path_weights = draw
        backbone = run_backbone(
            self.network,
            self.quantization,
            variables,
            batch.inputs,
            train=True,
            context=context._replace(key=key),
        )
        bound = bind_partner(self.network, partner)
        teacher = run_teacher(bound, batch.inputs) if self.needs_partner else NO_TEACHER
        features = Features(backbone.alive, teacher.alive, backbone.run_block)
        path_outputs = run_paths(bound, self.plan, mask, features)
        loss, metrics = self.objective(batch.targets, backbone, teacher, path_outputs, path_weights, context.progress)
        metrics |= self.task.training_metrics(backbone.logits, batch.targets)
        if self.plan.is_drawn:
            for number in range(self.plan.num_paths):
                metrics[f'path{number + 1}_lp_blocks'] = jnp.sum(mask[number])
        return loss, (backbone.collections, metrics)

    def logits(self, variables: Variables, inputs: Any) -> jax.Array:
        """Returns the LP network's logits in evaluation, (batch, classes)."""
        return run_backbone(self.network, self.quantization, variables, inputs, train=False).logits


def replace_blocks(
    network: BlockNetwork,
    partner: Any,
    batches: Iterable[Any],
    quantizers: Mapping[str, Any],
    plan: Plan | str = 'prefix',
    objective: Objective | None = None,
) -> tuple[BlockReplacement, Variables]:
    """Returns block replacement for a network, and its initial variables.

    Args:
        network: the network, divided into blocks.
        partner: the full-precision variables, {'params': ..., 'batch_stats': ...}.
        batches: batches of the network's inputs for calibration; at least one.
        quantizers: {'weights': settings, 'activations': settings, 'rules': settings of particular layers}, the keywords
            of `bqat_jax.prepare`.
        plan: a plan, or the name of a plan with default options.
        objective: the objective to minimise; None for the defaults.

    Returns:
        Block replacement, and the partner's parameters and statistics with calibrated quantizer parameters.

    Raises:
        ValueError: for settings, rules or plans that do not exist or do not fit the network, or without a batch.
    """
    if not hasattr(quantizers, 'keys') or not {'weights', 'activations'} <= set(quantizers):
        raise ValueError(
            f"quantizers={quantizers!r}: write {{'weights': settings, 'activations': settings}}, and 'rules' if layers "
            'differ.'
        )
    if not isinstance(plan, Plan | str):
        raise ValueError(f"plan={plan!r}: give a Plan or the name of one, 'none' for no mixed-precision models.")
    if not isinstance(partner, Mapping) or 'params' not in partner:
        raise ValueError("The partner's variables have no 'params': give {'params': ..., 'batch_stats': ...}.")
    partner = nn.meta.unbox(partner)
    if not hasattr(batches, 'shape') and not isinstance(batches, Mapping):  # `prepare` rejects a single batch.
        batches = list(batches)
    if isinstance(batches, list) and batches:  # `with_inputs` rejects inputs of other shapes than the network's.
        network = with_inputs(network, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batches[0]))
    run = network.as_function(partner, train=True, key=jax.random.key(0))
    quantization, parameters = prepare(run, partner['params'], batches, **quantizers)
    replacement = BlockReplacement(
        network,
        quantization,
        Plan(plan, len(network.blocks)) if isinstance(plan, str) else plan,
        Objective() if objective is None else objective,
    )
    return replacement, Variables(partner[PARAMS], parameters, other_collections(partner))
