"""Turns batches of stored examples into inputs and targets, on the device, inside the jitted step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.data.augmentation import augment, normalize
from bqat_jax.replacement.block_replacement import Batch


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; see `bqat_jax.data.augmentation`.

    Attributes:
        crop_padding: pixels of padding before a random crop; 0 for none.
        flip: whether images are flipped at random.
        color_jitter: strength of random colour changes; 0 for none.
    """

    crop_padding: int = 0
    flip: bool = False
    color_jitter: float = 0.0


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Makes a `Batch` from a batch of stored images.

    Attributes:
        mean: channel means, in units of the largest pixel.
        std: channel standard deviations, in units of the largest pixel.
        augmentation: augmentation in training.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation = Augmentation()

    def __call__(self, batch: Any, arrays: Any, key: jax.Array | None) -> Batch:
        """Returns images, float32 (batch, height, width, channels), and labels, int32 (batch, ..).

        Args:
            batch: {'image', 'label'}, or {'index'} if the split is on the device.
            arrays: that split, {'image', 'label'}, or None.
            key: random key of the augmentation; None for no augmentation.
        """
        images, labels = (get_array(batch, arrays, name) for name in ('image', 'label'))
        if key is not None:
            random = self.augmentation
            images = augment(
                key, images, crop_padding=random.crop_padding, flip=random.flip, jitter=random.color_jitter
            )
        return Batch(normalize(images, self.mean, self.std), labels)


@dataclasses.dataclass(frozen=True)
class TokenPreprocessing:
    """Makes a `Batch` from sequences of tokens: the targets are the next tokens."""

    def __call__(self, batch: Any, arrays: Any, key: jax.Array | None) -> Batch:
        """Returns all tokens but the last, int32 (batch, length), and all but the first.

        Args:
            batch: {'tokens'}, or {'index'} if the split is on the device.
            arrays: that split, {'tokens'}, or None.
            key: unused.
        """
        del key
        tokens = get_array(batch, arrays, 'tokens').astype(jnp.int32)
        return Batch(tokens[:, :-1], tokens[:, 1:])


def get_array(batch: Mapping[str, Any], arrays: Mapping[str, Any] | None, name: str) -> jax.Array:
    """Returns an array of a batch, gathered from `arrays` if the split is on the device."""
    return batch[name] if arrays is None else jnp.take(arrays[name], batch['index'], axis=0)
