"""The measures, as functions of arrays; everything is computed in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of a denominator that would otherwise be zero.
SMALLEST = 1e-30


class Products(NamedTuple):
    """What is needed to compare two vectors that come in parts; parts add up.

    Attributes:
        dot: their inner product.
        square: of the first.
        reference_square: of the second.
    """

    dot: jax.Array
    square: jax.Array
    reference_square: jax.Array

    @property
    def cosine(self) -> jax.Array:
        """Cosine similarity; 0 where one of the two vanishes."""
        return self.dot / jnp.maximum(jnp.sqrt(self.square * self.reference_square), SMALLEST)

    @property
    def relative_norm(self) -> jax.Array:
        """Norm of the first, divided by that of the second."""
        return jnp.sqrt(self.square / jnp.maximum(self.reference_square, SMALLEST))


def products(x: jax.Array, reference: jax.Array) -> Products:
    """Returns the products of two arrays of one shape."""
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    return Products(jnp.sum(x * reference), jnp.sum(x**2), jnp.sum(reference**2))


def relative_error(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns ‖x - reference‖ / ‖reference‖."""
    x, reference = x.astype(jnp.float32), reference.astype(jnp.float32)
    return jnp.sqrt(jnp.sum((x - reference) ** 2) / jnp.maximum(jnp.sum(reference**2), SMALLEST))


def linear_cka(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the linear centered kernel alignment of two sets of features (Kornblith et al., arXiv 1905.00414).

        ‖Yᵀ X‖² / (‖Xᵀ X‖ · ‖Yᵀ Y‖)   with Frobenius norms, of features centred over the examples

    1 if one is a rotation and scaling of the other; computed from the examples' Gram matrices, which gives the same.

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
    """Returns the linear CKA of two sets of features whose centred Gram matrices are given; see `linear_cka`."""
    norm = jnp.sqrt(jnp.sum(first**2) * jnp.sum(second**2))
    return jnp.sum(first * second) / jnp.maximum(norm, SMALLEST)


def decibels(signal: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns a signal-to-noise ratio in decibels, 10 · log10(signal / noise)."""
    return 10 * jnp.log10(jnp.maximum(signal, SMALLEST) / jnp.maximum(noise, SMALLEST))
