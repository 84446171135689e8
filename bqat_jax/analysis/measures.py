"""The measures as functions of arrays, computed in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Lower bound of denominators.
SMALLEST = 1e-30


class Products(NamedTuple):
    """Products for the comparison of two vectors; the products of parts of the vectors add up.

    Attributes:
        dot: the inner product.
        square: the squared norm of the first vector.
        reference_square: the squared norm of the second vector.
    """

    dot: jax.Array
    square: jax.Array
    reference_square: jax.Array

    @property
    def cosine(self) -> jax.Array:
        """Cosine similarity; 0 if one of the vectors is zero."""
        return self.dot / jnp.maximum(jnp.sqrt(self.square * self.reference_square), SMALLEST)

    @property
    def relative_norm(self) -> jax.Array:
        """Norm of the first vector divided by the norm of the second."""
        return jnp.sqrt(self.square / jnp.maximum(self.reference_square, SMALLEST))


def products(x: jax.Array, reference: jax.Array) -> Products:
    """Returns the products of two arrays of equal shape."""
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    return Products(jnp.sum(x * reference), jnp.sum(x**2), jnp.sum(reference**2))


def relative_error(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns ‖x - reference‖ / ‖reference‖."""
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    return jnp.sqrt(jnp.sum((x - reference) ** 2) / jnp.maximum(jnp.sum(reference**2), SMALLEST))


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the linear centered kernel alignment of two sets of features (Kornblith et al., arXiv 1905.00414).

        ‖Yᵀ X‖² / (‖Xᵀ X‖ · ‖Yᵀ Y‖)   with Frobenius norms, of features centred over the examples

    It is 1 if one set is a rotation and scaling of the other. It is computed from the Gram matrices of the examples,
    which is equivalent.

    Args:
        x: (examples, ...); all other axes are features.
        y: (examples, ...).
    """

    return alignment(centred_gram(x), centred_gram(y))


def centred_gram(features: jax.Array) -> jax.Array:
    """Returns the Gram matrix, float32 (examples, examples), of features (examples, ...) centred over the examples."""
    rows = features.reshape(features.shape[0], -1).astype(jnp.float32)
    rows = rows - jnp.mean(rows, axis=0, keepdims=True)
    return rows @ rows.T


def alignment(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns the linear CKA of two sets of features from their centred Gram matrices; see `linear_cka`."""
    norm = jnp.sqrt(jnp.sum(first**2) * jnp.sum(second**2))
    return jnp.sum(first * second) / jnp.maximum(norm, SMALLEST)


def decibels(signal: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns a signal-to-noise ratio in decibels, 10 · log10(signal / noise)."""
    return 10 * jnp.log10(jnp.maximum(signal, SMALLEST) / jnp.maximum(noise, SMALLEST))
