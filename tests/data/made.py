"""Makes small data sets of any kind, as somebody else would have prepared them."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

LABEL = tfds.features.ClassLabel(num_classes=2)


def png(pixels, **options):
    """The bytes of a PNG file; pixels of two axes are grey."""
    encoded = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(encoded, format='PNG', **options)
    return encoded.getvalue()


def prepare(directory, features, splits, *, file_format='array_record', register=None):
    """Prepares the data set 'made' in a folder.

    Args:
        directory: where.
        features: {'image': ..., 'label': ...}; given alone, a feature is that of the image.
        splits: {'train': examples, ...}, each example as the builder of it yields it, or a function that yields them.
        file_format: of the files.
        register: what to make of the builder class instead of preparing it.
    """
    features = features if isinstance(features, dict) else {'image': features, 'label': LABEL}

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version('1.0.0')
        pkg_dir_path = None

        def _info(self):
            described = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=described, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {name: self._generate_examples(examples) for name, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples() if callable(examples) else examples)

    if register is not None:
        return register(Made)
    return Made(data_dir=str(directory)).download_and_prepare(file_format=file_format)


def examples(images, labels=None):
    """Examples of images, with labels 0, 1, 0, 1, ... if none are given."""
    labels = [number % 2 for number in range(len(images))] if labels is None else labels
    return [{'image': image, 'label': label} for image, label in zip(images, labels, strict=True)]


def tensor(*shape, dtype='float32'):
    """The feature of images that are stored as they are."""
    return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype))


def shards(directory, split='train'):
    """The files of a split."""
    return sorted((directory / 'made' / '1.0.0').glob(f'made-{split}.*'))
