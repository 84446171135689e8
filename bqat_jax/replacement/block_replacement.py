"""Block replacement as one object: a cut network, its quantizers, a plan, an objective, and how they run together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.blocks.block_network import CutNetwork
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.paths import Teacher, run_backbone, run_paths, run_teacher
from bqat_jax.replacement.plans import Plan
from bqat_jax.transform import (
    Quantization,
    build_quantization,
    calibrate,
    find_layers,
    find_signed_inputs,
)
from bqat_jax.transform.rules import assign_quantizers


@dataclasses.dataclass(frozen=True)
class BlockReplacement:
    """The static half of training by block replacement; all arrays are arguments.

    Attributes:
        network: the cut network.
        quantization: its quantizers; none of them for full precision.
        plan: which mixed-precision models run.
        objective: what is minimised.

    Raises:
        ValueError: if nothing in the objective trains the LP network as a whole.
    """

    network: CutNetwork
    quantization: Quantization
    plan: Plan
    objective: Objective

    def __post_init__(self):
        if not self.objective.trains_network(self.plan.num_paths):
            raise ValueError(
                'The loss has no term of the low-precision network itself, whose head would not be trained: give '
                'replacement.cross_entropy, distillation, path_teaching (with a plan that has paths) or '
                'feature_matching a positive weight.'
            )

    @property
    def needs_partner(self) -> bool:
        """Whether the partner's features or logits are read."""
        return self.objective.needs_teacher(self.plan.num_paths) or self.plan.needs_partner_features

    def loss(
        self,
        params: Any,
        quantizer_params: Any,
        batch_stats: Any,
        partner: Any,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        *,
        progress: jax.Array | float = 1.0,
        deltas: Any = None,
        draw: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Runs the LP backbone, the teacher and the MP paths that the plan asks for, each once.

        Args:
            params: the LP network's parameters.
            quantizer_params: parameters of its quantizers.
            batch_stats: its batch statistics; {} if it has none.
            partner: the FP partner's variables, {'params': ..., 'batch_stats': ...}, which get no gradient; None if
                neither plan nor objective reads them.
            images: as the network takes them, examples along the first axis.
            labels: (batch,), integers.
            key: random key of the plan's draw, of the quantizers' and of dropout.
            progress: fraction of training that is done, for what follows a schedule.
            deltas: {layer path: {role: strength}} for quantizers whose estimator measures one.
            draw: mask and weights of the MP models, from `plan.draw`; if None they are drawn from the key.

        Returns:
            The loss, a scalar, and (new batch statistics, metrics).
        """
        plan_key, quantizer_key = jax.random.split(key)
        mask, path_weights = self.plan.draw(plan_key, progress) if draw is None else draw
        backbone = run_backbone(
            self.network,
            self.quantization,
            params,
            quantizer_params,
            batch_stats,
            images,
            train=True,
            context=Context(progress, quantizer_key, deltas),
        )
        teacher = run_teacher(self.network, partner, images) if self.needs_partner else Teacher(None, [])
        path_logits = run_paths(
            self.network,
            self.plan,
            partner,
            backbone.features,
            mask,
            partner_features=teacher.features,
            run_block=backbone.run_block,
        )
        loss, metrics = self.objective(
            labels,
            backbone.logits,
            teacher.logits,
            path_logits,
            path_weights,
            features=backbone.features,
            teacher_features=teacher.features,
            progress=progress,
        )
        metrics['train_top1'] = jnp.mean(jnp.argmax(backbone.logits, axis=-1) == labels, dtype=jnp.float32)
        if self.plan.is_drawn:
            for number in range(self.plan.num_paths):
                metrics[f'path{number + 1}_lp_blocks'] = jnp.sum(mask[number])
        return loss, (backbone.batch_stats, metrics)

    def logits(self, params: Any, quantizer_params: Any, batch_stats: Any, images: jax.Array) -> jax.Array:
        """Returns the LP network's logits, (batch, classes), as in evaluation."""
        return run_backbone(
            self.network, self.quantization, params, quantizer_params, batch_stats, images, train=False
        ).logits


def replace_blocks(
    network: CutNetwork,
    partner: Any,
    batches: Sequence[jax.Array],
    *,
    weights: Mapping[str, Any],
    activations: Mapping[str, Any],
    rules: Sequence[Mapping[str, Any]] = (),
    plan: Plan | str = 'prefix',
    objective: Objective | None = None,
) -> tuple[BlockReplacement, dict[str, Any]]:
    """Returns block replacement for a cut network, and calibrated parameters of its quantizers.

    Args:
        network: the cut network.
        partner: the full-precision variables, {'params': ..., 'batch_stats': ...}, from which training starts.
        batches: images to calibrate on, as the network takes them; at least one batch.
        weights: settings of the weights' quantizers, such as {'name': 'lsq', 'bits': 2, 'estimator': 'identity'}.
        activations: settings of the quantizers of the layers' inputs.
        rules: which layers differ; see `bqat_jax.transform.rules`.
        plan: a plan, or the name of one with its defaults.
        objective: what is minimised; its defaults if None.

    Raises:
        ValueError: for settings, rules or plans that do not exist or do not fit the network, or without a batch.
    """

    def run(params, images):
        variables = {'batch_stats': {}, **partner, 'params': params}
        return network.apply(variables, images, network.names, train=True, key=jax.random.key(0))

    if not batches:
        raise ValueError('Calibration needs at least one batch.')
    layers = find_layers(run, partner['params'], batches[0]).quantizable
    settings = assign_quantizers(tuple(layers), weights, activations, rules)
    signed = find_signed_inputs(run, partner['params'], batches, layers, settings)
    quantization = build_quantization(layers, settings, signed)
    replacement = BlockReplacement(
        network,
        quantization,
        Plan(plan, len(network.blocks)) if isinstance(plan, str) else plan,
        Objective() if objective is None else objective,
    )
    return replacement, calibrate(quantization, partner['params'], run, batches)
