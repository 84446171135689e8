"""Opens data sets as random-access sources of TensorFlow Datasets (ArrayRecord), without TensorFlow."""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from bqat_jax.data.caching import NOT_WISHED, Cache
from bqat_jax.data.crops import Crop
from bqat_jax.data.digits import Digits
from bqat_jax.data.digits_segmentation import DigitsSegmentation
from bqat_jax.data.examples import COMMON_RANGES, STATE_RANGE, ExampleFormat, TokenFormat, WrongExample, extremes
from bqat_jax.data.features import check_features, check_tokens
from bqat_jax.data.opening import brief, check_files, describe_data, describe_origin, open_builder
from bqat_jax.data.python_bytes import PythonBytes
from bqat_jax.errors import UserError
from bqat_jax.registry import Names

logger = logging.getLogger(__name__)

# Seed of the choice of training and validation images, which is equal in all runs, whatever their seed.
VALIDATION_SEED = 0
# Evenly spaced examples of a split that are checked when it is opened.
SAMPLE = 64
_SPLIT_KEYS = ('train_split', 'test_split', 'validation_split')
# Data sets that prepare themselves on first use, without TensorFlow.
DATASETS = Names('data set')


def register_dataset(builder: Any) -> Any:
    """Registers a builder class of TensorFlow Datasets, which is prepared on first use; a decorator.

    `config.data.name` is the class's name in snake case. Its features must be 'image' and 'label', its splits 'train'
    and 'test' unless `config.data.train_split` and `.test_split` are set.

    Raises:
        ValueError: if the name belongs to a class of another module.
    """
    return DATASETS.register(builder.name)(builder)


register_dataset(Digits)
register_dataset(DigitsSegmentation)
register_dataset(PythonBytes)


@dataclasses.dataclass(frozen=True)
class Subset:
    """An ordered subset of a random-access source.

    Attributes:
        source: the source of stored examples.
        positions: positions of the examples in the source.
        format: format of the examples; None to return them as stored.
        split: name of the split.
        files: (file name, first record, number of records) of each part of the source, in order.
        data_set: name with configuration and version.
    """

    source: Any
    positions: np.ndarray
    format: ExampleFormat | TokenFormat | None = None
    split: str = ''
    files: tuple[tuple[str, int, int], ...] = ()
    data_set: str = ''

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Returns an example, {'image', 'label'} or {'tokens'}, converted by its format.

        Raises:
            UserError: if it contradicts the data set's declaration. Damaged files raise many other errors.
        """
        return self._convert(number, self.source[int(self.positions[number])])

    def read(self, numbers: slice) -> list[dict[str, Any]]:
        """Returns consecutive examples, in one read if the source supports it; ArrayRecord is twice as fast then.

        Raises:
            UserError: if an example cannot be read, or contradicts the data set's declaration.
        """
        chosen = range(len(self))[numbers]
        examples = None
        if hasattr(self.source, '__getitems__'):
            try:
                examples = self.source.__getitems__(self.positions[numbers].tolist())
            except Exception:  # an example is damaged; single reads find out which
                logger.debug('Reading one by one.', exc_info=True)
        return [self._read_one(number, examples and examples[place]) for place, number in enumerate(chosen)]

    def where(self, number: int) -> str:
        """Returns a description of an example's record and file."""
        position = int(self.positions[number])
        for name, first, count in self.files:
            if position < count:
                return f'record {first + position} of {name}'
            position -= count
        return f'example {int(self.positions[number])} of its split'

    def _read_one(self, number: int, example: dict[str, Any] | None) -> dict[str, Any]:
        try:
            return self[number] if example is None else self._convert(number, example)
        except UserError:
            raise
        except Exception as error:  # see `__getitem__`
            raise unreadable(self.where(number), error) from error

    def _convert(self, number: int, example: dict[str, Any]) -> dict[str, Any]:
        if self.format is None:
            return example
        try:
            return self.format.read(example)
        except WrongExample as error:
            raise self.wrong(number, error) from error

    def wrong(self, number: int, error: WrongExample) -> UserError:
        """Returns the error for an example that contradicts the data set's declaration."""
        split = f' of split {self.split!r}' if self.split else ''
        return UserError(f'Example {int(self.positions[number])}{split} ({self.where(number)}) is rejected: {error}.')


def unreadable(where: str, error: Exception, remedy: str = 'Copy or prepare the data set again.') -> UserError:
    """Returns the error for an example that cannot be read.

    Args:
        where: description of the example.
        error: the cause.
        remedy: a sentence.
    """
    return UserError(f'{where[0].upper()}{where[1:]} cannot be read: {brief(error)}. {remedy}')


@dataclasses.dataclass(frozen=True)
class ImageData:
    """The three splits of a dataset, each a random-access source of {'image', 'label'} or {'tokens'}.

    Attributes:
        train: the training split.
        validation: the validation split, on which checkpoints are selected; may be empty.
        test: the test split, which selects nothing.
        num_classes: number of classes of an image, a pixel or a token.
        image_shape: shape of a network's input: (height, width, channels), or (length,) for tokens.
        crop: the crop of encoded images; None for decoded images, which have one size.
        dtype: dtype of images: 'uint8', from 0 to 255, or 'float32', from 0 to 1.
        value_range: for float32 images, the stored values that map to 0 and 1.
        label_shape: shape of an image's labels: () for one, (height, width) for one per pixel.
        is_tokens: whether examples are sequences of tokens, whose targets are the next tokens.
        description: the data set's metadata on its origin.
    """

    train: Subset
    validation: Subset
    test: Subset
    num_classes: int
    image_shape: tuple[int, ...]
    crop: Crop | None = None
    dtype: str = 'uint8'
    value_range: tuple[float, float] | None = None
    label_shape: tuple[int, ...] = ()
    is_tokens: bool = False
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def inputs(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a network's input for one example."""
        return jax.ShapeDtypeStruct(self.image_shape, np.int32 if self.is_tokens else np.float32)

    @property
    def example(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example after reading and cropping."""
        if self.is_tokens:
            return {'tokens': jax.ShapeDtypeStruct((self.image_shape[0] + 1,), np.uint8)}
        return {
            'image': jax.ShapeDtypeStruct(self.image_shape, self.dtype),
            'label': jax.ShapeDtypeStruct(self.label_shape, np.int32),
        }


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Options of a dataset.

    Attributes:
        validation_fraction: fraction of the training split to hold out, 0 <= fraction < 1.
        image_size: crop size in pixels; None for images of one size.
        train_split: split to train on, or a slice such as 'train[:80%]'.
        test_split: split to evaluate at the end, or a slice.
        validation_split: split to select checkpoints on, or a slice; None to hold out a fraction.
        train_examples: number of training images to use, before some are held out; None for all.
        value_range: lowest and highest value of float pixels, which map to 0 and 1; None to infer them from a sample.
        cache: cache of data sets in buckets.
        ignore: a further label, which the task ignores; None for none.
    """

    validation_fraction: float = 0.0
    image_size: int | None = None
    train_split: str = 'train'
    test_split: str = 'test'
    validation_split: str | None = None
    train_examples: int | None = None
    value_range: tuple[float, float] | None = None
    ignore: int | None = None
    cache: Cache = NOT_WISHED


def load_images(name: str, directory: str | None, options: ImageOptions = ImageOptions()) -> ImageData:
    """Opens a dataset by its TensorFlow Datasets name; checks its features and a sample of each split.

    Args:
        name: a name in `DATASETS`, such as 'digits', or of TensorFlow Datasets.
        directory: folder of prepared datasets, local or in a bucket; None for TensorFlow Datasets' default.
        options: options of the dataset.

    Raises:
        UserError: if the dataset does not exist, is not prepared, is damaged, or has features of another kind.
    """
    fraction = options.validation_fraction
    if not 0 <= fraction < 1:
        raise UserError(f'data.validation_fraction={fraction}: it must be at least 0 and less than 1.')
    builder = open_builder(name, directory, DATASETS.entries, options.cache)
    features, splits = describe_data(name, builder)
    form, channels = check_tokens(name, features), 0
    if form is None:
        form, channels = check_features(name, features, options.image_size, options.value_range)
        form = dataclasses.replace(form, ignore=options.ignore)
    keys = [key for key in _SPLIT_KEYS if getattr(options, key) is not None]
    if options.validation_split is not None and fraction > 0:
        raise UserError(
            f'data.validation_split={options.validation_split!r}, data.validation_fraction={fraction}: only one of '
            'them can be set. Leave the other out.'
        )
    chosen = {key: _find_split(name, key, getattr(options, key), builder, splits) for key in keys}
    for first, second in itertools.combinations(keys, 2):
        _check_disjoint(options, first, second, chosen)
    for instructions in chosen.values():
        check_files(instructions)
    opened = {key: _open_split(builder, getattr(options, key), chosen[key], form) for key in keys}
    if isinstance(form, ExampleFormat) and form.shape and form.value_range is None and form.dtype != np.uint8:
        form = dataclasses.replace(form, value_range=_find_range(name, opened['train_split']))
        opened = {key: dataclasses.replace(split, format=form) for key, split in opened.items()}
    for split in opened.values():
        _read_sample(split, lambda split, number: split[number])
    train, test = opened['train_split'], opened['test_split']
    order = np.random.default_rng(VALIDATION_SEED).permutation(len(train))
    if options.train_examples is not None:
        if not 1 <= options.train_examples <= len(train):
            raise UserError(f'data.train_examples={options.train_examples}: must be 1 to {len(train)} for {name!r}.')
        order = order[: options.train_examples]
    held_out = round(fraction * len(order))
    if held_out == len(order) or (fraction > 0 and held_out == 0):
        raise UserError(
            f'data.validation_fraction={fraction} of {len(order)} training images is {held_out}: at least one must be '
            'held out and one left. Use another fraction, or more images.'
        )
    size: Any = options.image_size
    taken = {
        'train': dataclasses.replace(train, positions=np.sort(order[held_out:])),
        'validation': opened.get('validation_split', dataclasses.replace(train, positions=np.sort(order[:held_out]))),
        'test': test,
        'num_classes': form.num_classes,
        'description': describe_origin(builder),
    }
    if isinstance(form, TokenFormat):
        return ImageData(**taken, image_shape=(form.length - 1,), is_tokens=True)
    return ImageData(
        **taken,
        label_shape=form.label_shape,
        image_shape=form.shape or (size, size, channels),
        crop=None if size is None else Crop(size, channels),
        dtype='uint8' if form.value_range is None else 'float32',
        value_range=form.value_range,
    )


def _find_split(name: str, key: str, split: str, builder: Any, splits: list[str]) -> Any:
    """The file instructions of a split or a slice."""
    known = f'The splits of {name!r}: {", ".join(splits)}; a slice is written {splits[0] if splits else "train"}[:80%].'
    try:
        info = builder.info.splits[split]
        instructions, count = list(info.file_instructions), info.num_examples
    except Exception as error:  # mostly ValueError; any error means an invalid text
        raise UserError(f'data.{key}={split!r} is not a split: {brief(error)}. {known}') from error
    if count == 0:
        raise UserError(f'data.{key}={split!r} has no examples. {known}')
    shared = _shared(instructions, instructions) - count
    if shared:
        raise UserError(f'data.{key}={split!r} has {shared // 2} examples more than once. {known}')
    return instructions


def _check_disjoint(options: ImageOptions, first: str, second: str, chosen: dict[str, Any]) -> None:
    shared = _shared(chosen[first], chosen[second])
    if shared:
        raise UserError(
            f'data.{first}={getattr(options, first)!r}, data.{second}={getattr(options, second)!r}: {shared} examples '
            'are in both. Use slices that do not overlap.'
        )


def _shared(these: Any, those: Any) -> int:
    """The number of records that two lists of file instructions share."""
    by_file = collections.defaultdict(list)
    for other in those:
        by_file[str(other.filename)].append(other)
    return sum(
        max(0, min(one.skip + one.take, other.skip + other.take) - max(one.skip, other.skip))
        for one in these
        for other in by_file[str(one.filename)]
    )


def _open_split(builder: Any, split: str, instructions: Any, form: ExampleFormat | TokenFormat) -> Subset:
    decoders: Any = {}
    if isinstance(form, ExampleFormat):
        encoded = ('image',) * form.is_encoded + ('label',) * bool(form.label_shape)
        decoders = {key: tfds.decode.SkipDecoding() for key in encoded}
    files = tuple((str(file.filename), file.skip, file.take) for file in instructions)
    try:
        source = builder.as_data_source(split, decoders=decoders)
        positions = np.arange(len(source))
    except Exception as error:  # the libraries raise many kinds
        raise UserError(
            f'Split {split!r} in {builder.data_path} cannot be read: {brief(error)}. Copy or prepare the data set '
            'again.'
        ) from error
    return Subset(source, positions, form, split, files, builder.info.full_name)


def _read_sample(split: Subset, read: Any) -> list[Any]:
    """The results of `read(split, number)` on an evenly spaced sample; damaged examples are left out.

    Raises:
        UserError: for the first example that contradicts the data set's declaration, or if none can be read.
    """
    results, damage = [], None
    for number in np.unique(np.linspace(0, len(split) - 1, SAMPLE).astype(int)):
        try:
            results.append(read(split, number))
        except UserError:
            raise
        except Exception as error:  # see `Subset.__getitem__`
            damage = damage or unreadable(split.where(number), error)
    if damage is not None and not results:
        raise damage
    return results


def _find_range(name: str, train: Subset) -> tuple[float, float]:
    """The first of `COMMON_RANGES` that contains the pixels of a sample of the training split."""

    def read(split: Subset, number: int) -> tuple[float, float]:
        assert isinstance(split.format, ExampleFormat)
        try:
            return extremes(split.format.pixels(split.source[int(split.positions[number])]))
        except WrongExample as error:
            raise split.wrong(number, error) from error

    lows, highs = zip(*_read_sample(train, read), strict=True)
    low, high = min(lows), max(highs)
    for lowest, highest in COMMON_RANGES:
        if lowest <= low and high <= highest:
            logger.info(
                'The pixels of %s are assumed to go from %g to %g: in %d training images they go from %g to %g. If '
                'this is wrong, state the range (%s).',
                *(name, lowest, highest, len(lows), low, high, STATE_RANGE),
            )
            return lowest, highest
    raise UserError(
        f"data.name={name!r}: the pixels of its feature 'image' go from {low:g} to {high:g} in {len(lows)} training "
        'images, which is in none of the ranges 0 to 1, -1 to 1 and 0 to 255. State the range of all images '
        f'({STATE_RANGE}).'
    )
