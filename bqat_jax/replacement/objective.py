"""The training objective: the task loss plus distillation losses from the FP and MP branches.

    L = e·l(z_Q, y) + a(t)·D(z_F, z_Q)
        + Σ_k w_k(t) · [ b·l(z_Mk, y) + c·D(z_F, z_Mk) + d·D(z_Mk, z_Q) ]
        + f · 1/n · Σ_i ‖h_i - g_i‖² / ‖g_i‖²

The task defines the loss l and the distance D; for classification they are the cross entropy CE(z, y) and, with
p = softmax(z / T), T²·KL(p_F ‖ p).

The combination of the task loss with distillation losses from the FP and MP branches is the paper's (arXiv
2412.15846). The weights w of prefixes are Block-KD's (arXiv 2411.01547), the factor T² is Hinton et al.'s (arXiv
1503.02531), and training on soft labels only (e = b = 0) is SQAKD's (arXiv 2309.13220). The feature loss is related to
FitNets (arXiv 1412.6550); its form, the default weights and their schedules are ours.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.replacement.losses import feature_loss
from bqat_jax.replacement.paths import Backbone, Outputs
from bqat_jax.replacement.schedules import ALWAYS, Schedule
from bqat_jax.replacement.task_kinds import CLASSIFICATION
from bqat_jax.replacement.tasks import Task

WEIGHTS = (
    'cross_entropy',
    'distillation',
    'path_cross_entropy',
    'path_distillation',
    'path_teaching',
    'feature_matching',
)
DISTILLATION = ('distillation', 'path_distillation', 'path_teaching')


@dataclasses.dataclass(frozen=True)
class Objective:
    """The constants of the objective.

    Attributes:
        cross_entropy: e, the weight of the task's loss on the LP network, for classification the cross entropy of the
            labels; 0 for soft labels only.
        distillation: a, the weight of distillation from the FP teacher to the LP network.
        path_cross_entropy: b, the weight of the task's loss on MP paths.
        path_distillation: c, the weight of distillation from the FP teacher to MP paths.
        path_teaching: d, the weight of distillation from MP paths to the LP network; paths get no gradient from it.
        feature_matching: f, the weight of the squared distance between LP and FP features at the ends of blocks.
        temperature: T > 0.
        distillation_schedule: a factor of a that may change over training.
        task: defines the loss and the distance.

    Raises:
        ValueError: for a negative weight or a temperature that is not positive, or if a distillation weight is positive
            and the task has no distance.
    """

    cross_entropy: float = 1.0
    distillation: float = 1.0
    path_cross_entropy: float = 1.0
    path_distillation: float = 1.0
    path_teaching: float = 0.0
    feature_matching: float = 0.0
    temperature: float = 1.0
    distillation_schedule: Schedule = ALWAYS
    task: Task = CLASSIFICATION

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ValueError(f'replacement.temperature={self.temperature}: must be positive and finite.')
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f'replacement.{name}={getattr(self, name)}: must be finite and not negative.')
        if min(self.distillation_schedule.ends) < 0:
            raise ValueError(
                f'replacement.distillation_schedule: {min(self.distillation_schedule.ends)} must not be negative.'
            )
        distilled = [f'{name}={getattr(self, name)}' for name in DISTILLATION if getattr(self, name) > 0]
        if distilled and not self.task.has_distance:
            raise ValueError(
                f'replacement.{distilled[0]}: the task {self.task.name or type(self.task).__name__!r} has no distance '
                'between the outputs of two networks, which distillation needs. Define one (CustomTask(loss, '
                f'distance)), or set {", ".join(DISTILLATION)} to 0.'
            )

    def check_trains_network(self, num_paths: int) -> None:
        """Checks that the loss has a term of the LP network's logits or features, with `num_paths` MP paths.

        Raises:
            ValueError: if it has none.
        """
        own = self.cross_entropy + self.distillation + self.feature_matching
        if own == 0 and (num_paths == 0 or self.path_teaching == 0):
            raise ValueError(
                'The loss has no term of the low-precision network itself, so its head would not be trained. Give '
                'replacement.cross_entropy, distillation, path_teaching (with a plan that has paths) or '
                'feature_matching a positive weight.'
            )

    def needs_teacher(self, num_paths: int) -> bool:
        """Returns whether the objective reads the teacher, with `num_paths` MP paths."""
        return self.distillation + self.feature_matching > 0 or (num_paths > 0 and self.path_distillation > 0)

    def __call__(
        self,
        targets: Any,
        student: Outputs | Backbone,
        teacher: Outputs,
        path_outputs: Iterable[Any],
        path_weights: jax.Array,
        progress: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss, a scalar, and its unweighted terms; terms of weight 0 are omitted.

        The terms always include the task's loss of the LP network, as 'loss/<loss_name>'.

        Args:
            targets: the task's targets; for classification integer labels (batch,).
            student: z_Q, and h_1 .. h_n for feature matching.
            teacher: z_F for distillation, and g_1 .. g_n for feature matching.
            path_outputs: z_M, one tree of outputs per path.
            path_weights: w, (paths,).
            progress: completed fraction of training.

        Raises:
            ValueError: if outputs and targets do not fit the task.
        """
        task, outputs = self.task, student.logits
        task.check(outputs, targets)
        name = f'loss/{task.loss_name}'

        def distance(student, teacher):
            return task.distance(student, teacher, targets, self.temperature)

        terms = {name: task.loss(outputs, targets)}
        loss = self.cross_entropy * terms[name]
        if self.distillation > 0:
            terms['loss/distillation'] = distance(outputs, teacher.logits)
            loss += self.distillation * self.distillation_schedule.at(progress) * terms['loss/distillation']
        for number, path in enumerate(path_outputs):
            name, path_loss = f'loss/path{number + 1}', jnp.float32(0)
            if self.path_cross_entropy > 0:
                terms[f'{name}_{task.loss_name}'] = task.loss(path, targets)
                path_loss += self.path_cross_entropy * terms[f'{name}_{task.loss_name}']
            if self.path_distillation > 0:
                terms[f'{name}_distillation'] = distance(path, teacher.logits)
                path_loss += self.path_distillation * terms[f'{name}_distillation']
            if self.path_teaching > 0:
                terms[f'{name}_teaching'] = distance(outputs, jax.lax.stop_gradient(path))
                path_loss += self.path_teaching * terms[f'{name}_teaching']
            loss += path_weights[number] * path_loss
        if self.feature_matching > 0:
            terms['loss/features'] = feature_loss(student.features, teacher.features)
            loss += self.feature_matching * terms['loss/features']
        return loss, {'loss': loss, **terms}


def task_alone(task: Task) -> Objective:
    """Returns the objective of plain training: the task's loss of the network only."""
    return Objective(distillation=0.0, path_cross_entropy=0.0, path_distillation=0.0, task=task)
