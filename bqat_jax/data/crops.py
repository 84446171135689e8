"""Crops of photographs to one size on the host: random crops for training, the centre for evaluation."""

import dataclasses
import io
import math

import numpy as np
from PIL import Image

from bqat_jax.data.examples import WrongExample

# Szegedy et al., arXiv 1409.4842, section 6: area 8 % to 100 %, aspect ratio 3/4 to 4/3; as in torchvision, ten tries,
# then the centre.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
# In evaluation the short side is resized to this multiple of the size: 256 for 224.
MARGIN = 256 / 224


@dataclasses.dataclass(frozen=True)
class Crop:
    """Decodes an image and crops it to a square.

    Pillow converts palettes and CMYK to RGB or grey, and drops transparency.

    Attributes:
        size: side of the square in pixels.
        channels: 1 or 3.
    """

    size: int
    channels: int

    def random(self, encoded: bytes, generator: np.random.Generator) -> np.ndarray:
        """Returns a random crop of an encoded image, resized: uint8 (size, size, channels).

        Raises:
            WrongExample: if it has more than 8 bits per pixel.
        """
        image = Image.open(io.BytesIO(encoded))
        left, top, width, height = random_box(generator, *image.size)
        return self._cut(image, (left, top, left + width, top + height))

    def center(self, encoded: bytes) -> np.ndarray:
        """Returns the centre of an encoded image resized to a short side of 256/224 · size: uint8 as in `random`.

        Raises:
            WrongExample: if it has more than 8 bits per pixel.
        """
        image = Image.open(io.BytesIO(encoded))
        side = min(image.size) * self.size / round(self.size * MARGIN)
        left, top = ((length - side) / 2 for length in image.size)
        return self._cut(image, (left, top, left + side, top + side))

    def _cut(self, image: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
        if image.mode.startswith(('I', 'F')):  # Pillow would clip values above 255
            raise WrongExample(
                f"its 'image' is a file of mode {image.mode}, with more than 8 bits a pixel, and Pillow resizes only "
                '8-bit images. Prepare the data set with 8-bit images'
            )
        whole = image.size
        # JPEG can be decoded at 1/2, 1/4 or 1/8; the box must stay at least as large as the result.
        shrink = min(box[2] - box[0], box[3] - box[1]) / self.size
        if shrink >= 2:
            least = (math.ceil(whole[0] / shrink), math.ceil(whole[1] / shrink))
            image.draft('RGB' if self.channels == 3 else 'L', least)
        across, down = (got / length for got, length in zip(image.size, whole, strict=True))
        image = image.convert('RGB' if self.channels == 3 else 'L')
        scaled = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=scaled)
        return np.asarray(image, np.uint8).reshape(self.size, self.size, self.channels)


def random_box(generator: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Returns (left, top, width, height) of a random crop; see the constants of this module."""
    for _ in range(TRIES):
        area = generator.uniform(*AREA) * width * height
        ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h
