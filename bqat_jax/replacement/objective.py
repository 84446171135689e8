"""What training minimises: the task loss joined with distillation losses from the FP and MP branches.

    L = e·CE(z_Q, y) + a(t)·T²·KL(p_F ‖ p_Q)
        + Σ_k w_k(t) · [ b·CE(z_Mk, y) + c·T²·KL(p_F ‖ p_Mk) + d·T²·KL(p_Mk ‖ p_Q) ]
        + f · 1/n · Σ_i ‖h_i - g_i‖² / ‖g_i‖²                              p = softmax(z / T)

That the objective joins the task loss with distillation losses from the FP and MP branches is the paper's (arXiv
2412.15846). The weights w of prefixes are Block-KD's (arXiv 2411.01547), the factor T² is Hinton et al.'s (arXiv
1503.02531), training on soft labels alone (e = b = 0) is SQAKD's (arXiv 2309.13220). The features' loss has many
relatives (FitNets, arXiv 1412.6550); its form here, the defaults of all weights, and their schedules are ours.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from bqat_jax.replacement.paths import Backbone, Outputs
from bqat_jax.replacement.schedules import ALWAYS, Schedule

WEIGHTS = (
    'cross_entropy',
    'distillation',
    'path_cross_entropy',
    'path_distillation',
    'path_teaching',
    'feature_matching',
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The constants of the objective.

    Attributes:
        cross_entropy: e, the weight of the labels' cross entropy on the LP network; 0 for soft labels alone.
        distillation: a, the weight of distillation from the FP teacher to the LP network.
        path_cross_entropy: b, the weight of the labels' cross entropy on MP paths.
        path_distillation: c, the weight of distillation from the FP teacher to MP paths.
        path_teaching: d, the weight of distillation from MP paths to the LP network; paths get no gradient from it.
        feature_matching: f, the weight of the squared distance between LP and FP features at the ends of blocks.
        temperature: T > 0.
        distillation_schedule: a factor of a that may change over training.

    Raises:
        ValueError: for a negative weight or a temperature that is not positive.
    """

    cross_entropy: float = 1.0
    distillation: float = 1.0
    path_cross_entropy: float = 1.0
    path_distillation: float = 1.0
    path_teaching: float = 0.0
    feature_matching: float = 0.0
    temperature: float = 1.0
    distillation_schedule: Schedule = ALWAYS

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f'replacement.temperature={self.temperature}: it must be positive and finite.')
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f'replacement.{name}={getattr(self, name)}: it must be finite and not negative.')
        if min(self.distillation_schedule.ends) < 0:
            raise ValueError(f'replacement.distillation_schedule: {min(self.distillation_schedule.ends)} is negative.')

    def check_trains_network(self, num_paths: int) -> None:
        """Checks that the LP network's own logits or features are in the loss, with so many MP paths.

        Raises:
            ValueError: if they are not.
        """
        own = self.cross_entropy + self.distillation + self.feature_matching
        if own == 0 and (num_paths == 0 or self.path_teaching == 0):
            raise ValueError(
                'The loss has no term of the low-precision network itself, whose head would not be trained: give '
                'replacement.cross_entropy, distillation, path_teaching (with a plan that has paths) or '
                'feature_matching a positive weight.'
            )

    def needs_teacher(self, num_paths: int) -> bool:
        """Whether anything of the teacher's is read, with so many MP paths."""
        return self.distillation + self.feature_matching > 0 or (num_paths > 0 and self.path_distillation > 0)

    def __call__(
        self,
        targets: jax.Array,
        student: Outputs | Backbone,
        teacher: Outputs,
        path_logits: Sequence[jax.Array],
        path_weights: jax.Array,
        progress: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss, a scalar, and its terms before they are weighted; a term of weight 0 is left out.

        The cross entropy of the LP network is always among the terms.

        Args:
            targets: labels, integers (batch,).
            student: z_Q and, read for feature matching alone, h_1 .. h_n.
            teacher: z_F, read if anything is distilled from it, and g_1 .. g_n, read for feature matching alone.
            path_logits: z_M, (batch, classes) for every path.
            path_weights: w, (paths,).
            progress: fraction of training that is done.
        """
        temperature, logits = self.temperature, student.logits
        assert logits is not None
        terms = {'loss/cross_entropy': cross_entropy(logits, targets)}
        loss = self.cross_entropy * terms['loss/cross_entropy']
        if self.distillation > 0:
            assert teacher.logits is not None
            terms['loss/distillation'] = distillation_loss(teacher.logits, logits, temperature)
            loss += self.distillation * self.distillation_schedule.at(progress) * terms['loss/distillation']
        for number, path in enumerate(path_logits):
            name, path_loss = f'loss/path{number + 1}', jnp.float32(0)
            if self.path_cross_entropy > 0:
                terms[f'{name}_cross_entropy'] = cross_entropy(path, targets)
                path_loss += self.path_cross_entropy * terms[f'{name}_cross_entropy']
            if self.path_distillation > 0:
                assert teacher.logits is not None
                terms[f'{name}_distillation'] = distillation_loss(teacher.logits, path, temperature)
                path_loss += self.path_distillation * terms[f'{name}_distillation']
            if self.path_teaching > 0:
                terms[f'{name}_teaching'] = distillation_loss(jax.lax.stop_gradient(path), logits, temperature)
                path_loss += self.path_teaching * terms[f'{name}_teaching']
            loss += path_weights[number] * path_loss
        if self.feature_matching > 0:
            terms['loss/features'] = feature_loss(student.features, teacher.features)
            loss += self.feature_matching * terms['loss/features']
        return loss, {'loss': loss, **terms}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross entropy of integer labels (batch,) under logits (batch, classes), in float32."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))


def distillation_loss(teacher_logits: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """Returns T² · KL(softmax(z_F / T) ‖ softmax(z / T)), the mean over the batch, in float32.

    Source: Hinton et al., arXiv 1503.02531; T² keeps the gradient's size as T changes.
    """
    targets = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    predictions = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(predictions, targets)
    return temperature**2 * jnp.mean(divergence)


def feature_loss(features: Sequence[jax.Array], teacher_features: Sequence[jax.Array]) -> jax.Array:
    """Returns the mean over blocks of ‖h_i - g_i‖² / ‖g_i‖², in float32; the sizes of features do not matter."""

    def error(h, g):
        h, g = h.astype(jnp.float32), g.astype(jnp.float32)
        return jnp.sum((h - g) ** 2) / jnp.maximum(jnp.sum(g**2), 1e-12)

    errors = [error(h, g) for h, g in zip(features, teacher_features, strict=True)]
    return sum(errors[1:], errors[0]) / len(errors)
