"""Where images come from: TensorFlow Datasets' random-access sources (ArrayRecord), read without TensorFlow."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bqat_jax.data.crops import Crop
from bqat_jax.data.digits import Digits
from bqat_jax.errors import UserError
from bqat_jax.registry import Names

logger = logging.getLogger(__name__)

# Which training images are taken and which are held out depends on nothing but their number: every run, whatever its
# seed, makes its choices on the same ones.
VALIDATION_SEED = 0
# Data sets that prepare themselves where they are first asked for, without TensorFlow.
DATASETS = Names('data set')


def register_dataset(builder: Any) -> Any:
    """Makes a builder class of TensorFlow Datasets known, which prepares itself when it is first read; a decorator.

    `config.data.name` is the class's name in snake case. Its features are 'image' and 'label', its splits 'train' and
    'test'.

    Raises:
        ValueError: if the name belongs to a class of another module.
    """
    return DATASETS.register(builder.name)(builder)


register_dataset(Digits)


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some examples of a random-access source, in a given order.

    Attributes:
        source: of examples.
        positions: of the examples in it.
        files: name and number of records of each file of the source, in its order.
    """

    source: Any
    positions: np.ndarray
    files: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.source[int(self.positions[number])]

    def read(self, numbers: slice) -> list[dict[str, Any]]:
        """Returns a run of examples; at once where the source can, which ArrayRecord does twice as fast."""
        positions = self.positions[numbers].tolist()
        if hasattr(self.source, '__getitems__'):
            return self.source.__getitems__(positions)
        return [self.source[position] for position in positions]

    def where(self, number: int) -> str:
        """Returns in words which record of which file an example is."""
        record = int(self.positions[number])
        for name, count in self.files:
            if record < count:
                return f'record {record} of {name}'
            record -= count
        return f'example {int(self.positions[number])} of its split'


@dataclasses.dataclass(frozen=True)
class ImageData:
    """The three splits of a dataset of labelled images, each a random-access source of {'image', 'label'}.

    Attributes:
        train: what the network trains on.
        validation: held out of the training data; choices are made on it. May be empty.
        test: evaluated at the end, selects nothing.
        num_classes: number of classes.
        image_shape: (height, width, channels) of what a network gets; images are uint8.
        crop: how squares are cut out of encoded images; None where images come decoded, all of one size.
    """

    train: Subset
    validation: Subset
    test: Subset
    num_classes: int
    image_shape: tuple[int, ...]
    crop: Crop | None = None


def load_images(
    name: str,
    directory: str | None,
    validation_fraction: float,
    image_size: int | None = None,
    test_split: str = 'test',
    train_examples: int | None = None,
) -> ImageData:
    """Opens a dataset by its TensorFlow Datasets name.

    Args:
        name: of `DATASETS`, such as 'digits', which prepare themselves, or a TensorFlow Datasets name.
        directory: where prepared datasets lie; None for TensorFlow Datasets' default.
        validation_fraction: how much of the training split to hold out, 0 <= fraction < 1.
        image_size: side of the squares that are cut out of the images; None to take images of one size as they are.
        test_split: name of the split that is evaluated at the end.
        train_examples: how many of the training images to take, before some are held out; None for all.

    Raises:
        UserError: if there is no such dataset, it is not prepared, or it is not one of labelled images.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f'data.validation_fraction={validation_fraction}: it must be at least 0 and less than 1.')
    builder: Any = _open_builder(name, directory)
    features = builder.info.features
    splits = set(builder.info.splits)
    if features is None or not {'image', 'label'} <= set(features) or not {'train', test_split} <= splits:
        raise UserError(
            f"data.name={name!r}: it needs features 'image' and 'label' and splits 'train' and {test_split!r} "
            f'(data.test_split); its splits: {", ".join(sorted(splits))}.'
        )
    shape, crop, decoders = tuple(features['image'].shape), None, {}
    if image_size is not None:
        if image_size < 1:
            raise UserError(f'data.image_size={image_size}: it must be at least 1.')
        shape = (image_size, image_size, shape[-1] or 3)
        crop, decoders = Crop(image_size, shape[-1]), {'image': tfds.decode.SkipDecoding()}
    elif None in shape:
        raise UserError(
            f'data.name={name!r} has images of many sizes: say how large squares to cut out of them '
            '(--config.data.image_size=224).'
        )
    train = builder.as_data_source('train', decoders=decoders)
    test = builder.as_data_source(test_split, decoders=decoders)
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(train))
    if train_examples is not None:
        if not 1 <= train_examples <= len(train):
            raise UserError(f'data.train_examples={train_examples}: {name!r} has 1 to {len(train)}.')
        order = order[:train_examples]
    held_out = round(validation_fraction * len(order))
    train_files, test_files = (_files_of(builder, split) for split in ('train', test_split))
    return ImageData(
        train=Subset(train, np.sort(order[held_out:]), train_files),
        validation=Subset(train, np.sort(order[:held_out]), train_files),
        test=Subset(test, np.arange(len(test)), test_files),
        num_classes=features['label'].num_classes,
        image_shape=shape,
        crop=crop,
    )


def _open_builder(name: str, directory: str | None) -> tfds.core.DatasetBuilder:
    tfds.disable_progress_bar()
    if name in DATASETS.entries:
        builder = DATASETS.get(name)(data_dir=_expand(directory))
        if not builder.is_prepared():
            logger.info('Preparing the data set %s in %s.', name, builder.data_path)
            builder.download_and_prepare(file_format='array_record')
        return builder
    try:
        builder = tfds.builder(name, data_dir=_expand(directory))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f'data.name={name!r}: TensorFlow Datasets has no dataset of that name'
            + (f', and {directory} holds none.' if directory else '.')
        ) from error
    if not builder.is_prepared() or builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f'data.name={name!r} is not prepared as ArrayRecord in {builder.data_path}. If it lies elsewhere say so '
            f'(--config.data.dir=DIR). To prepare it, once, in another virtual environment (it needs TensorFlow):\n'
            f'  pip install tensorflow-cpu tensorflow-datasets array_record\n'
            f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='DIR', "
            f"file_format='array_record').download_and_prepare()\""
        )
    return builder


def _files_of(builder: Any, split: str) -> tuple[tuple[str, int], ...]:
    return tuple((str(file.filename), file.take) for file in builder.info.splits[split].file_instructions)


def _expand(directory: str | None) -> str | None:
    return None if directory is None else str(Path(directory).expanduser())
