"""Reads batches of examples with Grain, in an order that depends on the seed alone.

Grain shuffles every epoch globally, and batch t is a pure function of seed and t, so that a resumed run reads the
batches of an uninterrupted one. For a split on the device only example numbers are read, in that order; the jitted step
gathers its images.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from bqat_jax.data.crops import Crop
from bqat_jax.data.examples import WrongExample
from bqat_jax.data.sources import Subset, unreadable
from bqat_jax.errors import UserError

logger = logging.getLogger(__name__)

# With skipping, the entry of a batch for examples that could not be read, by number; `INTACT` for the others.
DAMAGED, INTACT = 'damaged', -1
# ArrayRecord's message if the server of a bucket, not a file, is at fault.
NOT_READ = 'Could not read from the underlying reader'
# Consecutive damaged examples after which reading fails.
MOST_DAMAGED = 10
# Batches that each process prefetches if the host decodes examples.
PREFETCH_BATCHES = 4
READ_THREADS = 4
# Examples per read of `read_whole`.
READ_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every batch that this process reads.

    Attributes:
        number: number of the part, counted from 0.
        count: number of equal parts.
    """

    number: int = 0
    count: int = 1


@dataclasses.dataclass
class Split:
    """A split of a dataset, ready to be read in batches.

    Attributes:
        source: the examples.
        arrays: the complete split if it is on the device, {'image': (examples, height, width, channels), 'label': int32
            (examples, ..)} or {'tokens': (examples, length + 1)}; else None.
        workers: processes that decode; 0 for threads of this one. Ignored if the split is on the device.
        crop: the crop of encoded images; None for decoded images.
        share: the part of every batch that this process reads.
        skips_damaged: whether unreadable examples are skipped instead of raising an error. Ignored if the split is on
            the device.
        damaged: descriptions of the examples that this process has skipped.
    """

    source: Subset
    arrays: dict[str, Any] | None
    workers: int = 0
    crop: Crop | None = None
    share: Share = Share()
    skips_damaged: bool = False
    damaged: set[str] = dataclasses.field(default_factory=set)

    def __len__(self) -> int:
        return len(self.source)

    def training_batches(
        self, seed: int, batch_size: int, start: int, stop: int, *, random_crops: bool = True
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches `start` to `stop - 1` of an endless, shuffled sequence of epochs.

        Args:
            seed: seed of the shuffles.
            batch_size: examples per batch over all processes; batches run across the ends of epochs.
            start: number of the first batch, counted from the beginning of training.
            stop: number after the last batch.
            random_crops: whether crops are random instead of centred; only with `crop`.

        Yields:
            {'image', 'label', 'mask'}, {'tokens', 'mask'}, or {'index', 'mask'} if the split is on the device, for this
            process's rows; the mask is all true.
        """
        # Only the epochs needed: the length of an endless dataset overflows at batch size 1.
        epochs = max(1, -(-stop * batch_size // len(self)))
        order = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(epochs)
        return self._read(order, batch_size, start, stop, for_training=True, random_crops=random_crops)

    def evaluation_batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields every example once, in order, with a 'mask' that is false for the padding of the last batch."""
        count = -(-len(self) // batch_size)
        order = grain.MapDataset.range(count * batch_size)
        return self._read(order, batch_size, 0, count, for_training=False, random_crops=False)

    def _read(
        self, order: grain.MapDataset, batch_size: int, start: int, stop: int, *, for_training: bool, random_crops: bool
    ) -> Iterator[dict[str, Any]]:
        source = None if self.arrays is not None else self.source
        skips = source is not None and self.skips_damaged
        read = _ReadExample(source, len(self), self.crop, skips, for_training)
        # Grain gives every position of the sequence its own generator, which a restart reproduces.
        is_random = self.crop is not None and random_crops
        examples = order.random_map(read) if is_random else order.map(read)
        own = examples.batch(batch_size // self.share.count).slice(slice(self.share.number, None, self.share.count))
        batches = own.slice(slice(start, stop))
        if self.arrays is not None:
            return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        dataset = batches.to_iter_dataset(options)
        if self.workers > 0:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which are not parsed without main.py
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return self._note_damage(iter(dataset)) if skips else iter(dataset)

    def _note_damage(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Removes the entry `DAMAGED` of batches; logs every damaged example once."""
        for batch in batches:
            numbers = np.asarray(batch.pop(DAMAGED))
            for number in numbers[numbers != INTACT]:
                example = self.source.where(int(number))
                if example not in self.damaged:
                    logger.warning('Skipped: %s cannot be read.', example)
                self.damaged.add(example)
            yield batch


@dataclasses.dataclass(frozen=True)
class _ReadExample:
    """Reads the example at a position, or only its number without a source. Positions past the end are padding.

    With `skips_damaged`, an unreadable training example is replaced by the next readable one, and an unreadable test
    example is masked; the batch has its number.
    """

    source: Subset | None
    count: int
    crop: Crop | None
    skips_damaged: bool
    for_training: bool

    def __call__(self, position: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        number = min(position, self.count - 1)
        mask = np.bool_(position < self.count)
        if self.source is None:
            return {'index': np.int32(number), 'mask': mask}
        if not self.skips_damaged:
            try:
                return {**self._read(number, generator), 'mask': mask}
            except _DamagedExample as error:
                remedy = 'Prepare the dataset again, or skip damaged examples (--config.data.skip_damaged=true).'
                raise unreadable(self.source.where(number), error.cause, remedy) from error.cause
        for other in range(number, number + MOST_DAMAGED):
            try:
                example = self._read(other % self.count, generator)
            except _DamagedExample:
                continue
            damaged = np.int32(INTACT if other == number else number)
            return {**example, 'mask': mask & (self.for_training | (other == number)), DAMAGED: damaged}
        raise UserError(
            f'{MOST_DAMAGED} consecutive examples cannot be read, from {self.source.where(number)} on. Prepare the '
            'dataset again.'
        )

    def _read(self, number: int, generator: np.random.Generator | None) -> dict[str, Any]:
        assert self.source is not None
        try:
            example = self.source[number]
            if self.crop is not None:
                image = example['image']
                image = self.crop.center(image) if generator is None else self.crop.random(image, generator)
                example = {**example, 'image': image}
        except UserError:  # it contradicts the data set's declaration, and is never skipped
            raise
        except WrongExample as error:
            raise self.source.wrong(number, error) from error
        except Exception as error:  # ArrayRecord, Pillow and TensorFlow Datasets raise many kinds for damaged files
            if 'gs://' in str(error) and NOT_READ in str(error):  # not an error of the example
                remedy = 'Its bucket denies access or does not respond. Run the same command again to resume.'
                raise unreadable(self.source.where(number), error, remedy) from error
            raise _DamagedExample(error) from error
        return example if self.crop is None else {**example, 'label': np.int32(example['label'])}


class _DamagedExample(Exception):
    """An example that cannot be read."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


def read_whole(source: Subset) -> dict[str, np.ndarray]:
    """Decodes a complete split into memory: {'image': uint8 or float32, 'label': int32} or {'tokens': uint8}.

    Raises:
        UserError: if an example cannot be read, or contradicts the data set's declaration.
    """
    (first,) = source.read(slice(0, 1))
    whole = {key: np.empty((len(source), *np.shape(x)), np.asarray(x).dtype) for key, x in first.items()}
    for start in range(0, len(source), READ_AT_ONCE):
        run = slice(start, start + READ_AT_ONCE)
        examples = source.read(run)
        for key, array in whole.items():
            array[run] = [example[key] for example in examples]
    return whole
