"""Augmentation and normalisation of images on the device.

Images are uint8 with a largest pixel of 255, or float32 with 1; black is 0 in both.
"""

import jax
import jax.numpy as jnp


def largest_pixel(images: jax.Array) -> float:
    """Returns the largest possible pixel of images: 255 for uint8, 1 for float32.

    Raises:
        TypeError: for another dtype.
    """
    if images.dtype == jnp.uint8:
        return 255.0
    if images.dtype == jnp.float32:
        return 1.0
    raise TypeError(f'Images are {images.dtype}; they must be uint8, from 0 to 255, or float32, from 0 to 1.')


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads images with `padding` black pixels on each side and crops them to their size at random.

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
    """Flips each image horizontally with probability one half; images are (batch, height, width, channels)."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1, :], images)


def color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and saturation of each image by random factors.

    Each factor is uniform in [1 - strength, 1 + strength], at least 0, and blends the image with black, with its mean
    grey level, and with its grey levels, as in torchvision's ColorJitter, but always in this order.

    Args:
        key: random key.
        images: uint8 or float32 (batch, height, width, 1 or 3 channels).
        strength: 0 changes nothing.
    """
    if strength == 0:
        return images
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = jax.random.uniform(key, (3, images.shape[0], 1, 1, 1), minval=low, maxval=high)
    return adjust_colors(images, *factors)


def adjust_colors(images: jax.Array, brightness: jax.Array, contrast: jax.Array, saturation: jax.Array) -> jax.Array:
    """Multiplies brightness, contrast and saturation of images by factors, in this order.

    Args:
        images: uint8 or float32 (batch, height, width, 1 or 3 channels).
        brightness: (batch, 1, 1, 1); 1 changes nothing.
        contrast: (batch, 1, 1, 1).
        saturation: (batch, 1, 1, 1).
    """

    def grey(x):  # ITU-R BT.601, as in PIL and torchvision
        weights = jnp.array((0.299, 0.587, 0.114) if x.shape[-1] == 3 else (1.0,), jnp.float32)
        return jnp.sum(x * weights.reshape(1, 1, 1, -1), axis=-1, keepdims=True)

    def blend(x, other, factor):
        return jnp.clip(other + factor * (x - other), 0.0, largest)

    largest = largest_pixel(images)
    x = images.astype(jnp.float32)
    x = blend(x, jnp.zeros_like(x), brightness)
    x = blend(x, jnp.mean(grey(x), axis=(1, 2), keepdims=True), contrast)
    x = blend(x, grey(x), saturation)
    return x if images.dtype == jnp.float32 else jnp.round(x).astype(images.dtype)


def augment(key: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool, jitter: float = 0.0) -> jax.Array:
    """Crops, flips (if `flip`) and recolours images at random; keeps shape and dtype."""
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, crop_padding)
    images = random_flip(flip_key, images) if flip else images
    return color_jitter(jax.random.fold_in(key, 2), images, jitter)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Maps images to float32: (value / largest pixel - mean) / std per channel.

    Args:
        images: uint8 or float32 (..., channels).
        mean: channel means, in units of the largest pixel.
        std: channel standard deviations, in units of the largest pixel.
    """
    shape = (1,) * (images.ndim - 1) + (len(mean),)
    scaled = images.astype(jnp.float32) / largest_pixel(images)
    return (scaled - jnp.array(mean, jnp.float32).reshape(shape)) / jnp.array(std, jnp.float32).reshape(shape)
