"""Every data set that prepares itself is one of labelled images or of tokens, in train and test."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bqat_jax.data.pipeline import read_whole
from bqat_jax.data.sources import DATASETS, ImageOptions, load_images, register_dataset

# It reads the whole of Python's library.
SLOW = ('python_bytes',)


@pytest.mark.parametrize('name', [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in DATASETS])
def test_a_data_set_that_prepares_itself(name, digits_dir):
    images = load_images(name, digits_dir, ImageOptions(0.1))
    for subset in (images.train, images.validation, images.test):
        arrays = read_whole(subset)
        if images.is_tokens:
            assert arrays['tokens'].dtype == np.uint8 and arrays['tokens'].shape[1:] == (images.image_shape[0] + 1,)
            continue
        assert arrays['image'].dtype == np.uint8 and arrays['image'].shape[1:] == images.image_shape
        assert arrays['label'].dtype == np.int32 and arrays['label'].shape[1:] == images.label_shape
        assert arrays['label'].min() >= 0 and arrays['label'].max() < images.num_classes


def test_a_data_set_of_the_users_is_known_by_its_name(tmp_path, registries):
    @register_dataset
    class TwoColors(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')
        pkg_dir_path = None

        def _info(self):
            features = {'image': tfds.features.Image(shape=(4, 4, 1)), 'label': tfds.features.ClassLabel(num_classes=2)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples(8), 'test': self._generate_examples(2)}

        def _generate_examples(self, count):
            for number in range(count):
                encoded = io.BytesIO()
                Image.fromarray(np.full((4, 4), 255 * (number % 2), np.uint8)).save(encoded, format='PNG')
                encoded.seek(0)
                yield number, {'image': encoded, 'label': number % 2}

    images = load_images('two_colors', str(tmp_path), ImageOptions(0.25))
    assert (len(images.train), len(images.validation), len(images.test)) == (6, 2, 2)
    arrays = read_whole(images.test)
    np.testing.assert_array_equal(arrays['image'][:, 0, 0, 0], 255 * arrays['label'])
