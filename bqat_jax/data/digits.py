"""The handwritten digits of scikit-learn, as a TensorFlow Datasets builder."""

import io
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_FRACTION = 0.2


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 scanned 8×8 digits (E. Alpaydin, C. Kaynak, 1998; UCI), in a fixed stratified train/test split."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES: ClassVar[dict[str, str]] = {'1.0.0': 'First version.'}
    # The base class looks for a package beside this file to read metadata from; there is none.
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='Handwritten digits, 8 by 8 pixels, from scikit-learn.',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
                    'label': tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=('image', 'label'),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        # Imported here: it takes 2 seconds, and only the preparation needs it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits: Any = load_digits()
        labels = digits.target
        train, test = train_test_split(np.arange(len(labels)), test_size=TEST_FRACTION, stratify=labels, random_state=0)
        return {'train': self._generate_examples(digits, train), 'test': self._generate_examples(digits, test)}

    def _generate_examples(self, digits: Any, chosen: Any):
        for number in sorted(chosen):
            # The scans have 17 grey levels, 0 to 16.
            pixels = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, format='PNG')
            encoded.seek(0)
            yield int(number), {'image': encoded, 'label': int(digits.target[number])}
