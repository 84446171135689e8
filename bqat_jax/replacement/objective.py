"""What training minimises: the task loss joined with distillation losses from the FP and MP branches.

    L = CE(z_Q, y) + a·T²·KL(p_F ‖ p_Q) + Σ_i w_i · [ b·CE(z_Mi, y) + a·T²·KL(p_F ‖ p_Mi) ],    p = softmax(z / T)

That the objective joins these losses is the paper's (arXiv 2412.15846). The weights w_i are Block-KD's (arXiv
2411.01547), the factor T² is Hinton et al.'s (arXiv 1503.02531), the defaults of a, b and T are ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Objective:
    """The constants of the objective.

    Attributes:
        distillation: a, the weight of distillation from the FP teacher; 0 turns the teacher off.
        path_cross_entropy: b, the weight of the labels' cross entropy on MP paths.
        temperature: T > 0.

    Raises:
        ValueError: for a negative weight or a temperature that is not positive.
    """

    distillation: float = 1.0
    path_cross_entropy: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f'replacement.temperature={self.temperature}: it must be positive.')
        for name in ('distillation', 'path_cross_entropy'):
            if getattr(self, name) < 0:
                raise ValueError(f'replacement.{name}={getattr(self, name)}: a weight of the loss cannot be negative.')

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits are read at all."""
        return self.distillation > 0

    def __call__(
        self,
        labels: jax.Array,
        logits: jax.Array,
        teacher_logits: jax.Array | None,
        path_logits: jax.Array | None,
        path_weights: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss, a scalar, and its terms before they are weighted.

        Args:
            labels: (batch,), integers.
            logits: z_Q, (batch, classes).
            teacher_logits: z_F, (batch, classes); may be None if `needs_teacher` is false.
            path_logits: z_M, (paths, batch, classes), or None for no paths.
            path_weights: w, (paths,).
        """
        terms = {'loss/cross_entropy': cross_entropy(logits, labels)}
        loss = terms['loss/cross_entropy']
        if self.needs_teacher:
            assert teacher_logits is not None
            terms['loss/distillation'] = distillation_loss(teacher_logits, logits, self.temperature)
            loss += self.distillation * terms['loss/distillation']
        for number, path in enumerate([] if path_logits is None else path_logits):
            name = f'loss/path{number + 1}'
            terms[f'{name}_cross_entropy'] = cross_entropy(path, labels)
            path_loss = self.path_cross_entropy * terms[f'{name}_cross_entropy']
            if self.needs_teacher:
                assert teacher_logits is not None
                terms[f'{name}_distillation'] = distillation_loss(teacher_logits, path, self.temperature)
                path_loss += self.distillation * terms[f'{name}_distillation']
            loss += path_weights[number] * path_loss
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
