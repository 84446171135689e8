"""A generated dataset of TensorFlow Datasets: JPEGs of ImageNet's usual size.

It is a separate module because a class registers its dataset when it is defined, and worker processes run the main
module again under another name.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 90


class Photographs(tfds.core.GeneratorBasedBuilder):
    """Noise of several scales, which takes as many bytes as photographs: about 100 kB each."""

    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = None

    def _info(self):
        image, label = tfds.features.Image(encoding_format='jpeg'), tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({'image': image, 'label': label})
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {'train': self._generate_examples(512), 'validation': self._generate_examples(1)}

    def _generate_examples(self, count):
        generator = np.random.default_rng(count)
        for number in range(count):
            picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
            for size in (4, 16, 64, 256):
                noise = generator.integers(0, 256, (size, size, 3)).astype(np.uint8)
                picture += np.asarray(Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
            encoded = io.BytesIO()
            Image.fromarray((picture / 4).astype(np.uint8)).save(encoded, format='JPEG', quality=QUALITY)
            encoded.seek(0)
            yield number, {'image': encoded, 'label': number % 10}
