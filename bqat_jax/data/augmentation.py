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


def color_jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and saturation of each image by random factors.

    Each factor is uniform in [1 - strength, 1 + strength], not below 0, and blends the image with black, with the mean
    of its grey levels, and with its grey levels, as torchvision's ColorJitter does; the order is always this one.

    Args:
        key: random key.
        images: uint8 (batch, height, width, 1 or 3 channels).
        strength: 0 changes nothing.
    """
    if strength == 0:
        return images
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = jax.random.uniform(key, (3, images.shape[0], 1, 1, 1), minval=low, maxval=high)
    return adjust_colors(images, *factors)


def adjust_colors(images: jax.Array, brightness: jax.Array, contrast: jax.Array, saturation: jax.Array) -> jax.Array:
    """Returns images with brightness, contrast and saturation multiplied by factors, one after the other.

    Args:
        images: uint8 (batch, height, width, 1 or 3 channels).
        brightness: (batch, 1, 1, 1), as the two others; 1 changes nothing.
        contrast: see above.
        saturation: see above.
    """

    def grey(x):  # ITU-R BT.601, as PIL and torchvision have it
        weights = jnp.array((0.299, 0.587, 0.114) if x.shape[-1] == 3 else (1.0,), jnp.float32)
        return jnp.sum(x * weights.reshape(1, 1, 1, -1), axis=-1, keepdims=True)

    def blend(x, other, factor):
        return jnp.clip(other + factor * (x - other), 0.0, 255.0)

    x = images.astype(jnp.float32)
    x = blend(x, jnp.zeros_like(x), brightness)
    x = blend(x, jnp.mean(grey(x), axis=(1, 2), keepdims=True), contrast)
    x = blend(x, grey(x), saturation)
    return jnp.round(x).astype(images.dtype)


def augment(key: jax.Array, images: jax.Array, *, crop_padding: int, flip: bool, jitter: float = 0.0) -> jax.Array:
    """Returns randomly cropped, mirrored if `flip`, and recoloured images of the same shape and dtype."""
    crop_key, flip_key = jax.random.split(key)
    images = random_crop(crop_key, images, crop_padding)
    images = random_flip(flip_key, images) if flip else images
    return color_jitter(jax.random.fold_in(key, 2), images, jitter)


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Maps uint8 images to float32: (value / 255 - mean) / std, channel by channel."""
    shape = (1,) * (images.ndim - 1) + (len(mean),)
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.array(mean, jnp.float32).reshape(shape)) / jnp.array(std, jnp.float32).reshape(shape)
