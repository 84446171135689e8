"""Checks a data set's declared features before any example is read."""

import math
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bqat_jax.data.examples import STATE_RANGE, ExampleFormat, TokenFormat
from bqat_jax.errors import UserError

FULL_RANGE = {'bool': (0.0, 1.0), 'uint16': (0.0, 65535.0)}
NEEDED = (
    "An 'image' must be a tfds.features.Image, or a tfds.features.Tensor of numbers, of shape (height, width, "
    'channels), with 1 or 3 channels'
)


def check_tokens(name: str, features: Any) -> TokenFormat | None:
    """Returns the format of a data set with the single feature 'tokens'; None for any other data set.

    Raises:
        UserError: if its tokens are not bytes in sequences of one length.
    """
    if not isinstance(features, tfds.features.FeaturesDict) or set(features) != {'tokens'}:
        return None
    tokens: Any = features['tokens']
    kind: Any = type(tokens)
    shape: Any = tokens.shape if kind is tfds.features.Tensor else ()
    if len(shape) != 1 or (shape[0] or 0) < 2 or np.dtype(tokens.np_dtype) != np.uint8:
        raise UserError(
            f"data.name={name!r}: its feature 'tokens' is {describe(tokens)}. It must be a tfds.features.Tensor of "
            'uint8 with shape (length + 1,), the inputs and one more token. Prepare it as such.'
        )
    return TokenFormat(256, int(shape[0]))


def check_features(
    name: str, features: Any, image_size: int | None, value_range: tuple[float, float] | None
) -> tuple[ExampleFormat, int]:
    """Returns the format that a data set declares, and the number of channels.

    Args:
        name: name of the data set.
        features: its features, from TensorFlow Datasets.
        image_size: crop size in pixels; None for images of one size.
        value_range: the range stated by the user; None for that of the dtype. Without it, the format of float and wide
            integer images has no range, which must then be inferred.

    Raises:
        UserError: if they are not those of labelled images, or do not suit `image_size` or `value_range`.
    """
    if not isinstance(features, tfds.features.FeaturesDict) or not {'image', 'label'} <= set(features):
        kind = ', '.join(features) if isinstance(features, tfds.features.FeaturesDict) else type(features).__name__
        raise UserError(
            f"data.name={name!r} has the features {kind}; it needs 'image' and 'label'. Use another data set, or "
            'prepare it with these names.'
        )
    value_range = _check_range(value_range)
    image: Any = features['image']
    num_classes, label_shape = _check_label(name, features['label'], image)
    told = f"data.name={name!r}: its feature 'image' is {describe(image)}"
    # Other features are subclasses of these two: masks of LabeledImage, boxes, text.
    kind: Any = type(image)
    encoded = kind is tfds.features.Image
    if not encoded and kind is not tfds.features.Tensor:
        raise UserError(f'{told}. {NEEDED}. Use another data set, or prepare it as such.')
    shape, dtype = tuple(image.shape), np.dtype(image.np_dtype)
    if len(shape) != 3:
        kinds = {2: ', images without an axis of channels', 4: ', videos or volumes'}
        raise UserError(f'{told}{kinds.get(len(shape), "")}. {NEEDED}. Use another data set, or prepare it as such.')
    if shape[-1] not in ((None, 0, 1, 3) if encoded and image_size is not None else (None, 1, 3)):
        raise UserError(
            f'{told}, with {shape[-1]} channels. {NEEDED}. Prepare it without transparency, as RGB or grey.'
        )
    if dtype.kind not in 'buif':
        raise UserError(f'{told}. {NEEDED}. Prepare it as uint8.')
    if encoded and dtype == np.uint16 and shape[-1] != 1:
        raise UserError(
            f'{told}: Pillow reads 16-bit files in colour as 8-bit ones. Prepare it as uint8, or as a '
            'tfds.features.Tensor of uint16.'
        )
    if image_size is not None:
        _check_crops(told, image_size, encoded, dtype, value_range)
        if label_shape:
            raise UserError(
                f'data.image_size={image_size}: {told}, with a label for every pixel, which would not be cropped. '
                'Leave data.image_size unset.'
            )
        return ExampleFormat(num_classes, dtype, True, None), shape[-1] or 3
    if None in shape:
        remedy = (
            'set the crop size (--config.data.image_size=224).'
            if encoded and dtype == np.uint8
            else 'prepare it with images of one size.'
        )
        raise UserError(f'data.name={name!r} has images of many sizes (its feature is {describe(image)}): {remedy}')
    if 0 in shape:
        raise UserError(f'{told}: images without pixels. {NEEDED}. Prepare it as such.')
    value_range = value_range or FULL_RANGE.get(dtype.name)
    if dtype == np.uint8 and value_range == (0.0, 255.0):
        value_range = None
    return ExampleFormat(num_classes, dtype, encoded, shape, value_range, label_shape), shape[-1]


def describe(feature: Any) -> str:
    """Describes a feature by its class, dtype and shape."""
    try:
        shape: Any = feature.shape
        dtype: Any = feature.np_dtype
        shape, dtype = tuple(shape), np.dtype(dtype).name
    except Exception:  # nested features have no single shape
        return f'a {type(feature).__name__}'
    return f'a {type(feature).__name__} ({dtype}, shape {shape})'


def _check_range(value_range: Any) -> tuple[float, float] | None:
    if value_range is None:
        return None
    try:
        lowest, highest = map(float, value_range)
    except (TypeError, ValueError):
        lowest = highest = math.nan
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        raise UserError(
            f'data.value_range={value_range}: it must be the lowest and the highest possible pixel, such as '
            '(0.0, 1.0), (0.0, 255.0) or (-1.0, 1.0).'
        )
    return lowest, highest


def _check_label(name: str, label: Any, image: Any) -> tuple[int, tuple[int, ...]]:
    """The number of classes, and the shape of an image's labels."""
    if isinstance(label, tfds.features.LabeledImage):
        shape: Any = label.shape
        dtype: Any = label.np_dtype
        fits = None not in shape and tuple(shape) == (*image.shape[:2], 1) and np.dtype(dtype) == np.uint8
        if fits and (label.num_classes or 0) >= 2:
            return int(label.num_classes or 0), tuple(shape[:2])
        raise UserError(
            f"data.name={name!r}: its feature 'label' is {describe(label)}, and its images are {describe(image)}. "
            'Labels of pixels must be uint8 of shape (height, width, 1), with the size of the images and two or more '
            'classes. Prepare it as such.'
        )
    if not isinstance(label, tfds.features.ClassLabel) or label.num_classes is None or label.num_classes < 2:
        classes = f' of {label.num_classes} classes' if isinstance(label, tfds.features.ClassLabel) else ''
        raise UserError(
            f"data.name={name!r}: its feature 'label' is {describe(label)}{classes}. It must be a "
            'tfds.features.ClassLabel of two or more classes, one label for each image, or a LabeledImage, one for '
            'each pixel. Use another data set, or prepare it as such.'
        )
    return label.num_classes, ()


def _check_crops(told: str, image_size: int, encoded: bool, dtype: np.dtype, value_range: Any) -> None:
    if image_size < 1:
        raise UserError(f'data.image_size={image_size}: it must be at least 1.')
    if not encoded or dtype != np.uint8:
        raise UserError(
            f'data.image_size={image_size}: {told[0].lower()}{told[1:]}. Only encoded 8-bit images '
            '(tfds.features.Image of uint8) can be cropped, because Pillow resizes no others. Leave data.image_size '
            'unset, or prepare it as such.'
        )
    if value_range not in (None, (0.0, 255.0)):
        raise UserError(
            f'data.value_range={value_range}, data.image_size={image_size}: the pixels of encoded 8-bit images go '
            f'from 0 to 255. Leave {STATE_RANGE.partition("=")[0]} out.'
        )
