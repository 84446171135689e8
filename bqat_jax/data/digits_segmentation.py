"""Handwritten digits on larger canvases, with a label for every pixel."""

import io
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_FRACTION = 0.2
SIDE, DIGIT = 16, 8
COUNTS = {'train': 4000, 'test': 800}
MOST_DIGITS = 3
# A digit's pixels are those at least this bright, of 16 grey levels.
INK = 4


class DigitsSegmentation(tfds.core.GeneratorBasedBuilder):
    """One to three of scikit-learn's 8×8 digits (E. Alpaydin, C. Kaynak, 1998; UCI) on canvases of 16×16 pixels.

    A pixel's label is 0 for the background and d + 1 for the digit d. Test and training canvases share no digits.
    """

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES: ClassVar[dict[str, str]] = {'1.0.0': 'First version.'}
    # The base class looks for a package beside this file to read metadata from; there is none.
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='Handwritten digits on canvases of 16 by 16 pixels, from scikit-learn.',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(SIDE, SIDE, 1), dtype=np.uint8),
                    'label': tfds.features.LabeledImage(labels=11, shape=(SIDE, SIDE, 1), dtype=np.uint8),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        # Imported here: it takes 2 seconds, and only the preparation needs it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        labels = digits.target
        train, test = train_test_split(np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=0)
        parts = {'train': sorted(train), 'test': sorted(test)}
        return {name: self._generate_examples(digits, chosen, COUNTS[name]) for name, chosen in parts.items()}

    def _generate_examples(self, digits: Any, chosen: Any, count: int):
        generator = np.random.default_rng(0)
        for number in range(count):
            image, label = draw_canvas(digits, chosen, generator)
            yield number, {'image': _encode(image), 'label': _encode(label)}


def draw_canvas(digits: Any, chosen: Any, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image, uint8 (16, 16), and the labels of its pixels.

    Args:
        digits: scikit-learn's data set.
        chosen: indices of the digits to draw from.
        generator: the random generator.
    """
    image, label = np.zeros((2, SIDE, SIDE), np.uint8)
    corners: list[tuple[int, int]] = []
    for _ in range(generator.integers(1, MOST_DIGITS + 1)):
        top, left = (int(n) for n in generator.integers(0, SIDE - DIGIT + 1, 2))
        number = chosen[generator.integers(len(chosen))]
        if any(abs(top - y) < DIGIT and abs(left - x) < DIGIT for y, x in corners):
            continue  # it would overlap another digit
        corners.append((top, left))
        pixels = digits.images[number]
        window = np.s_[top : top + DIGIT, left : left + DIGIT]
        image[window] = np.round(pixels * (255 / 16))
        label[window] = np.where(pixels >= INK, digits.target[number] + 1, 0)
    return image, label


def _encode(pixels: np.ndarray) -> io.BytesIO:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format='PNG')
    encoded.seek(0)
    return encoded
