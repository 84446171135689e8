"""What happens to images on the device: augmentation in training, and normalisation."""

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads images with black by `padding` pixels on each side and cuts the original size out at random.

    Args:
        key: random key.
        images: (batch, height, width, channels).
        padding: pixels; 0 changes nothing.
    """
    if padding == 0:
        return images
    height, width, channels = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half; images are (batch, height, width, channels)."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1, :], images)


def augment(key: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """Returns randomly cropped and, if `flip`, mirrored images of the same shape and dtype."""
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, crop_padding)
    return random_flip(flip_key, images) if flip else images


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Maps uint8 images to float32: (value / 255 - mean) / std, channel by channel."""
    shape = (1,) * (images.ndim - 1) + (len(mean),)
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.array(mean, jnp.float32).reshape(shape)) / jnp.array(std, jnp.float32).reshape(shape)
