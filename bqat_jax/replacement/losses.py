"""Losses and distances between arrays or trees of arrays, computed in float32."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Lower bound of the squared norm that errors are divided by.
SMALLEST_NORM = 1e-12


def mean(values: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """Returns the mean of float32 values where `counted`, bool of their shape, is true; 0 if it is true nowhere.

    None stands for all values.
    """
    if counted is None:
        return jnp.mean(values)
    number = jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(counted, values, 0.0)) / number


def cross_entropies(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the cross entropy of every position, float32 (..).

    Args:
        logits: floats (.., classes).
        targets: integer labels (..), or probabilities (.., classes).
    """
    logits = logits.astype(jnp.float32)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        return optax.softmax_cross_entropy(logits, targets.astype(jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def cross_entropy(logits: jax.Array, targets: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """Returns the mean cross entropy over counted positions, a float32 scalar.

    Arguments as in `cross_entropies` and `mean`.
    """
    return mean(cross_entropies(logits, targets), counted)


def distillation_loss(
    teacher_logits: jax.Array, logits: jax.Array, temperature: float, counted: jax.Array | None = None
) -> jax.Array:
    """Returns T² · KL(softmax(z_F / T) ‖ softmax(z / T)), the mean over counted positions, a float32 scalar.

    Source: Hinton et al., arXiv 1503.02531. T² keeps the gradient's scale as T changes.

    Args:
        teacher_logits: z_F, floats (.., classes).
        logits: z, floats (.., classes).
        temperature: T.
        counted: bool (..), see `mean`.
    """
    targets = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    predictions = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(predictions, targets)
    return temperature**2 * mean(divergence, counted)


def bernoulli_distillation_loss(teacher_logits: jax.Array, logits: jax.Array, temperature: float) -> jax.Array:
    """Returns T² · KL(B(σ(z_F / T)) ‖ B(σ(z / T))) of Bernoulli distributions B, the mean over all logits, in float32.

    This is `distillation_loss` for multi-label targets.

    Args:
        teacher_logits: z_F, floats of any shape.
        logits: z, in the shape of z_F.
        temperature: T.
    """
    teacher, own = (z.astype(jnp.float32) / temperature for z in (teacher_logits, logits))
    divergence = jax.nn.sigmoid(teacher) * (jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(own))
    divergence += jax.nn.sigmoid(-teacher) * (jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-own))
    return temperature**2 * jnp.mean(divergence)


def relative_squared_error(h: jax.Array, g: jax.Array) -> jax.Array:
    """Returns ‖h - g‖² / ‖g‖² in float32, for arrays of equal shape."""
    h, g = h.astype(jnp.float32), g.astype(jnp.float32)
    return jnp.sum((h - g) ** 2) / jnp.maximum(jnp.sum(g**2), SMALLEST_NORM)


def tree_distance(tree: Any, teacher_tree: Any) -> jax.Array | None:
    """Returns the mean of ‖h - g‖² / ‖g‖² over the float leaves of two equally structured trees, or None without any.

    Every leaf has equal weight, at any size and scale. Other leaves (masks, lengths) are skipped.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(teacher_tree), strict=True)
    errors = [relative_squared_error(h, g) for h, g in pairs if jnp.issubdtype(h.dtype, jnp.floating)]
    return sum(errors[1:], errors[0]) / len(errors) if errors else None


def feature_loss(features: Sequence[Any], teacher_features: Sequence[Any]) -> jax.Array:
    """Returns the mean over blocks of ‖h_i - g_i‖² / ‖g_i‖², in float32; blocks have equal weight.

    Args:
        features: h_1 .. h_n, each an array or a tree of arrays, see `tree_distance`.
        teacher_features: g_1 .. g_n, with the structures and shapes of `features`.

    Raises:
        ValueError: if no block returns floats.
    """
    pairs = zip(features, teacher_features, strict=True)
    errors = [error for error in (tree_distance(h, g) for h, g in pairs) if error is not None]
    if not errors:
        raise ValueError(
            'replacement.feature_matching: no block returns an array of floats, so there is nothing to match. Set it '
            'to 0, or cut the network elsewhere.'
        )
    return sum(errors[1:], errors[0]) / len(errors)
