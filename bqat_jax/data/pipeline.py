"""The order in which examples are read, and how they reach the device.

The order is a pure function of the seed: Grain shuffles every epoch anew, globally, and batch number t is the same
whether a run came there in one go or was resumed. A split that lives on the device is fed by example numbers alone, in
the same order; its images are gathered inside the jitted step.
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

# In a batch of a reading that skips: the number of an example that could not be read, or that it is intact.
DAMAGED, INTACT = 'damaged', -1
# What ArrayRecord says where the server of a bucket, and not a file, is at fault.
NOT_READ = 'Could not read from the underlying reader'
# So many one after another are no accident.
MOST_DAMAGED = 10
# Batches that reading threads keep ready in each process, when examples are decoded on the way.
PREFETCH_BATCHES = 4
READ_THREADS = 4
# Examples that are read at once when a whole split is.
READ_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every batch that this process reads.

    Attributes:
        number: of the part, counted from 0.
        count: how many equal parts there are.
    """

    number: int = 0
    count: int = 1


@dataclasses.dataclass
class Split:
    """A split of a dataset, ready to be read in batches.

    Attributes:
        source: the examples.
        arrays: the whole split if it lives on the device, {'image': (examples, height, width, channels), 'label': int32
            (examples, ..)} or {'tokens': (examples, length + 1)}; else None.
        workers: processes that decode; 0 for threads of this one. Not read when the split lives on the device.
        crop: how squares are cut out of encoded images; None where images come decoded.
        share: what this process reads of every batch.
        skips_damaged: whether examples that cannot be read are skipped, instead of raising an error. Not read when the
            split lives on the device.
        damaged: what was skipped by this process so far, in words.
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
        """Yields the batches number `start` to `stop - 1` of an endless shuffled reading.

        Args:
            seed: of the shuffles.
            batch_size: examples per batch, of all processes together; batches run on over the ends of epochs.
            start: number of the first batch, counted from the beginning of training.
            stop: number after the last.
            random_crops: whether squares are cut out at random, and not the centre; only where `crop` is given.

        Yields:
            {'image', 'label', 'mask'}, {'tokens', 'mask'}, or {'index', 'mask'} when the split lives on the device, of
            this process's rows; the mask is all true.
        """
        # As many epochs as are read: an endless one has a length that overflows at batch size 1.
        epochs = max(1, -(-stop * batch_size // len(self)))
        order = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat(epochs)
        return self._read(order, batch_size, start, stop, for_training=True, random_crops=random_crops)

    def evaluation_batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields every example once, in order, with a 'mask' that is false where the last batch is filled up."""
        count = -(-len(self) // batch_size)
        order = grain.MapDataset.range(count * batch_size)
        return self._read(order, batch_size, 0, count, for_training=False, random_crops=False)

    def _read(
        self, order: grain.MapDataset, batch_size: int, start: int, stop: int, *, for_training: bool, random_crops: bool
    ) -> Iterator[dict[str, Any]]:
        source = None if self.arrays is not None else self.source
        skips = source is not None and self.skips_damaged
        read = _ReadExample(source, len(self), self.crop, skips, for_training)
        # Grain gives every position of the endless reading a generator of its own, the same after a restart.
        is_random = self.crop is not None and random_crops
        examples = order.random_map(read) if is_random else order.map(read)
        own = examples.batch(batch_size // self.share.count).slice(slice(self.share.number, None, self.share.count))
        batches = own.slice(slice(start, stop))
        if self.arrays is not None:
            return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
        dataset = batches.to_iter_dataset(options)
        if self.workers > 0:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags; as a library we may run without main.py
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return self._note_damage(iter(dataset)) if skips else iter(dataset)

    def _note_damage(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Passes batches on without what they say of damage; warns of every damaged example once."""
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
    """Reads the example at a position; without a source its number alone. Positions past the end are filling.

    If `skips_damaged`, a training example that cannot be read gives its place to the next that can, and one of an
    evaluation is masked; the batch tells its number.
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
                remedy = 'Prepare the dataset again, or skip what is damaged (--config.data.skip_damaged=true).'
                raise unreadable(self.source.where(number), error.cause, remedy) from error.cause
        for other in range(number, number + MOST_DAMAGED):
            try:
                example = self._read(other % self.count, generator)
            except _DamagedExample:
                continue
            damaged = np.int32(INTACT if other == number else number)
            return {**example, 'mask': mask & (self.for_training | (other == number)), DAMAGED: damaged}
        raise UserError(
            f'{MOST_DAMAGED} examples one after another cannot be read, from {self.source.where(number)} on.'
        )

    def _read(self, number: int, generator: np.random.Generator | None) -> dict[str, Any]:
        assert self.source is not None
        try:
            example = self.source[number]
            if self.crop is not None:
                image = example['image']
                image = self.crop.center(image) if generator is None else self.crop.random(image, generator)
                example = {**example, 'image': image}
        except UserError:  # it is not damaged, but not what the data set declares: never skipped
            raise
        except WrongExample as error:
            raise self.source.wrong(number, error) from error
        except Exception as error:  # ArrayRecord, Pillow and TensorFlow Datasets raise many kinds for damaged files
            if 'gs://' in str(error) and NOT_READ in str(error):  # it says nothing of the example, and none is skipped
                remedy = 'Its bucket refuses or does not answer. Run the same command again to go on.'
                raise unreadable(self.source.where(number), error, remedy) from error
            raise _DamagedExample(error) from error
        return example if self.crop is None else {**example, 'label': np.int32(example['label'])}


class _DamagedExample(Exception):
    """An example that cannot be read."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


def read_whole(source: Subset) -> dict[str, np.ndarray]:
    """Decodes a whole split into memory: {'image': uint8 or float32, 'label': int32} or {'tokens': uint8}.

    Raises:
        UserError: if an example cannot be read, or is not what the data set declares.
    """
    (first,) = source.read(slice(0, 1))
    whole = {key: np.empty((len(source), *np.shape(x)), np.asarray(x).dtype) for key, x in first.items()}
    for start in range(0, len(source), READ_AT_ONCE):
        run = slice(start, start + READ_AT_ONCE)
        examples = source.read(run)
        for key, array in whole.items():
            array[run] = [example[key] for example in examples]
    return whole
