"""Reads splits of a dataset and places their batches on the devices."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from bqat_jax.data.decoded import read_decoded
from bqat_jax.data.pipeline import Share, Split
from bqat_jax.data.sources import Subset
from bqat_jax.distributed.processes import put_batch
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.distributed.sharding import over_batch, replicated
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.experiment.streams import Stream, data_seed
from bqat_jax.training.evaluation import Evaluation, evaluate
from bqat_jax.training.spec import TrainSpec
from bqat_jax.training.step import make_evaluation_step


class Data(NamedTuple):
    """The data of training.

    Attributes:
        train: the training split.
        validation: the validation split, on which checkpoints are selected; None if there is none.
    """

    train: Split
    validation: Split | None


def load_data(experiment: Experiment) -> Data:
    """Returns the training and validation splits; reads them onto the device if the experiment keeps them there."""
    images = experiment.data.images
    train = load_split(experiment, images.train)
    return Data(train, load_split(experiment, images.validation) if len(images.validation) else None)


def load_split(experiment: Experiment, subset: Subset) -> Split:
    """Returns a split; reads it onto the device if the experiment keeps it there."""
    data, arrays = experiment.data, None
    if data.on_device:
        experiment.console.print(f'Reading {len(subset)} examples onto the device.')
        arrays = jax.device_put(read_decoded(subset, data.kept), replicated(experiment.placement.mesh))
    share = Share(jax.process_index(), jax.process_count())
    return Split(subset, arrays, data.workers, data.images.crop, share, data.skips_damaged)


def training_batches(
    experiment: Experiment, split: Split, stream: Stream, replicas: Replicas, start: int, stop: int
) -> Iterator[Any]:
    """Yields the training batches `start` to `stop - 1` of a stream, on the devices; the step augments them.

    Args:
        experiment: gives one seed per replica, and the batch size.
        split: the split to read.
        stream: the stream, which determines the order of examples.
        replicas: the replicas that read in parallel.
        start: number of the first batch, counted from the beginning of training.
        stop: number after the last batch.
    """
    batch_size = experiment.data.batch_size
    readings = [
        split.training_batches(data_seed(seed, stream), batch_size, start, stop)
        for seed in experiment.seeds[: replicas.count]
    ]
    return replicas.batches(readings)


def batch_shapes(experiment: Experiment, split: Split, replicas: Replicas) -> Any:
    """Returns shapes, dtypes and shardings of the batches of `training_batches` in one process, without reading."""
    images = experiment.data.images
    example = images.example if split.arrays is None else {'index': jax.ShapeDtypeStruct((), np.int32)}
    axes = (experiment.data.batch_size,) if replicas.count == 1 else (replicas.count, experiment.data.batch_size)
    sharding = over_batch(replicas.mesh)
    return {
        name: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype, sharding=sharding)
        for name, x in {**example, 'mask': jax.ShapeDtypeStruct((), np.bool_)}.items()
    }


def plain_batches(
    experiment: Experiment, split: Split, seed: int, stream: Stream, count: int
) -> Iterator[dict[str, jax.Array]]:
    """Yields `count` batches of a stream on the devices without random crops, for measurements."""
    batches = split.training_batches(data_seed(seed, stream), experiment.data.batch_size, 0, count, random_crops=False)
    return (put_batch(batch, over_batch(experiment.placement.mesh)) for batch in batches)


def make_evaluation(
    experiment: Experiment,
    spec: TrainSpec,
    replicas: Replicas,
    split: Split,
    before_each: Callable[[], None] = lambda: None,
) -> Callable[[Any, Any], tuple[Evaluation, ...]]:
    """Returns `evaluation(params, collections)`, which evaluates every replica on a split.

    Args:
        experiment: gives the devices and the batch size.
        spec: the training of the networks.
        replicas: the networks.
        split: the split; must not be empty.
        before_each: called before every batch; an exception ends the evaluation.
    """
    step, devices = make_evaluation_step(spec, replicas), experiment.placement.mesh.devices.size
    batch_size = -(-experiment.data.batch_size // devices) * devices  # a multiple of the devices

    def batches():
        for batch in split.evaluation_batches(batch_size):
            before_each()
            yield put_batch(batch, replicas.evaluation_sharding)

    def evaluation(params, collections):
        return evaluate(lambda batch: step(params, collections, split.arrays, batch), batches(), spec.replacement.task)

    return evaluation
