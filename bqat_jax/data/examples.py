"""The formats of examples: checks every example and converts images to uint8, or float32 from 0 to 1."""

import dataclasses
import io
from typing import Any

import numpy as np
from PIL import Image

# Candidates for the range of float or integer pixels if the user states none; the first that fits is used.
COMMON_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
STATE_RANGE = "--config.data.value_range='(LOWEST, HIGHEST)'"


class WrongExample(Exception):
    """An example does not match its data set's declaration; the message has the difference and the remedy."""


@dataclasses.dataclass(frozen=True)
class ExampleFormat:
    """The declared format of examples with images.

    Attributes:
        num_classes: labels are 0 to num_classes - 1.
        dtype: dtype of the stored pixels.
        is_encoded: whether images are stored as the bytes of a PNG or JPEG file.
        shape: (height, width, channels) of every image; None if images stay encoded and are cropped later.
        value_range: the values that map to 0 and 1; None for uint8 pixels, which are not scaled.
        label_shape: () for one label per image, (height, width) for one per pixel, encoded as a PNG file.
        ignore: a further label, which the task ignores; None for none.
    """

    num_classes: int
    dtype: np.dtype
    is_encoded: bool
    shape: tuple[int, ...] | None
    value_range: tuple[float, float] | None = None
    label_shape: tuple[int, ...] = ()
    ignore: int | None = None

    def read(self, example: dict[str, Any]) -> dict[str, Any]:
        """Checks and converts a stored example.

        Args:
            example: {'image', 'label'} as stored; images are encoded if `is_encoded`.

        Returns:
            {'image', 'label'}: uint8, or float32 from 0 to 1 with a `value_range`, (height, width, channels); encoded
            bytes without a `shape`. The label is int32, of `label_shape`.

        Raises:
            WrongExample: if label, shape, dtype or range differ from the declaration.
        """
        label = self._check_labels(example['label']) if self.label_shape else self._check_label(example['label'])
        if self.shape is None:
            return {'image': example['image'], 'label': label}
        pixels = self.pixels(example)
        return {'image': pixels if self.value_range is None else scale(pixels, self.value_range), 'label': label}

    def pixels(self, example: dict[str, Any]) -> np.ndarray:
        """Returns the decoded image without scaling.

        Raises:
            WrongExample: if shape or dtype differ from the declaration.
        """
        pixels = self._decode(example['image']) if self.is_encoded else np.asarray(example['image'])
        if pixels.dtype != self.dtype or pixels.shape != self.shape:
            raise WrongExample(
                f"its 'image' is {pixels.dtype} of shape {pixels.shape}, and the data set declares {self.dtype} of "
                f'shape {self.shape}. Prepare the data set with images of the declared kind'
            )
        return pixels

    def _decode(self, encoded: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(encoded))
        if self.dtype == np.float32:  # TensorFlow Datasets stores the four bytes of a float as PNG channels
            four = np.ascontiguousarray(image)
            if four.dtype != np.uint8 or four.ndim != 3 or four.shape[-1] != 4:
                raise WrongExample(
                    f"its 'image' is a file of mode {image.mode}, and TensorFlow Datasets stores float32 images as "
                    'RGBA. Prepare the data set again'
                )
            return four.view(np.float32)
        if image.mode == '1':
            image = image.convert('L')
        elif image.mode == 'P':  # the array of a palette image holds indices, not colours
            image = image.convert('RGBA' if 'transparency' in image.info else 'RGB')
        pixels = np.asarray(image)
        if image.mode == 'I' and self.dtype == np.uint16:  # older versions of Pillow open 16-bit files like this
            pixels = pixels.astype(np.uint16)
        return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels

    def _check_labels(self, encoded: bytes) -> np.ndarray:
        labels = np.asarray(Image.open(io.BytesIO(encoded)))
        wrong = labels[(labels >= self.num_classes) & (labels != self.ignore)]
        if labels.shape != self.label_shape or labels.dtype.kind not in 'ui' or wrong.size:
            raise WrongExample(
                f"its 'label' is {labels.dtype} of shape {labels.shape} with labels up to {labels.max()}, and the data "
                f'set declares 0 to {self.num_classes - 1}, of shape {self.label_shape}. Prepare it with such '
                'labels, or name the label to ignore (--config.task=segmentation:ignore=LABEL)'
            )
        return labels.astype(np.int32)

    def _check_label(self, label: Any) -> np.int32:
        if 0 <= label < self.num_classes or label == self.ignore:
            return np.int32(label)
        what = "it has no label (its 'label' is -1)" if label == -1 else f"its 'label' is {label}"
        raise WrongExample(
            f'{what}, and labels are 0 to {self.num_classes - 1}. Use splits with labels (--config.data.train_split, '
            '--config.data.test_split), or prepare the data set with valid ones'
        )


@dataclasses.dataclass(frozen=True)
class TokenFormat:
    """The declared format of examples with sequences of tokens.

    Attributes:
        num_classes: tokens are 0 to num_classes - 1.
        length: tokens of an example, one more than the network's input.
    """

    num_classes: int
    length: int

    def read(self, example: dict[str, Any]) -> dict[str, Any]:
        """Returns {'tokens'}, uint8 (length,).

        Raises:
            WrongExample: if shape or dtype differ from the declaration.
        """
        tokens = np.asarray(example['tokens'])
        if tokens.dtype != np.uint8 or tokens.shape != (self.length,):
            raise WrongExample(
                f"its 'tokens' are {tokens.dtype} of shape {tokens.shape}, and the data set declares uint8 of shape "
                f'{(self.length,)}. Prepare the data set with tokens of the declared kind'
            )
        return {'tokens': tokens}


def scale(pixels: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Maps pixels linearly from a range to float32 from 0 to 1.

    Raises:
        WrongExample: if a pixel is outside the range, or not a number.
    """
    # Bounds are compared in the pixels' dtype: in float32, 0.7 is not above 0.7.
    lowest, highest = np.array(value_range, pixels.dtype if pixels.dtype.kind == 'f' else np.float64)
    low, high = extremes(pixels)
    if low < lowest or high > highest:
        raise WrongExample(
            f"the pixels of its 'image' go from {low:g} to {high:g}, outside of data.value_range="
            f'({value_range[0]:g}, {value_range[1]:g}). State the range of all images ({STATE_RANGE})'
        )
    lowest, highest = np.float32(lowest), np.float32(highest)
    return np.clip((pixels.astype(np.float32) - lowest) / (highest - lowest), 0, 1)


def extremes(pixels: np.ndarray) -> tuple[float, float]:
    """Returns the smallest and the largest pixel.

    Raises:
        WrongExample: if a pixel is NaN or infinite.
    """
    if pixels.dtype.kind == 'f' and not np.isfinite(pixels).all():
        raise WrongExample("its 'image' holds NaN or infinity. Prepare the data set with finite pixels")
    return pixels.min().item(), pixels.max().item()
