"""Measures how fast photographs are read: the input of a training run against a bare loop that only decodes.

Command: python -m benchmarks.input --workers=0,1,2

Random images of ImageNet's usual size (500 x 375 pixels, JPEG) are prepared as a dataset of TensorFlow Datasets. The
bare loop opens, crops and resizes these images one after another in one thread. Rounds are interleaved; the table has
medians, and images per second and core; the bare loop has one core.
"""

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks.photographs import Photographs
from bqat_jax.data.pipeline import Split
from bqat_jax.data.sources import ImageData, ImageOptions, load_images


def bare_loop(images: ImageData, count: int) -> float:
    """Reads, decodes and crops `count` training images at random; returns images per second."""
    assert images.crop is not None
    generator = np.random.default_rng(0)
    began = time.perf_counter()
    for number in range(count):
        images.crop.random(images.train[number % len(images.train)]['image'], generator)
    return count / (time.perf_counter() - began)


def pipeline(split: Split, batch_size: int, batches: int) -> float:
    """Reads training batches as a run does; returns images per second after the first batch."""
    reading = iter(split.training_batches(0, batch_size, 0, batches + 1))
    next(reading)  # worker processes have started
    began = time.perf_counter()
    for _ in reading:
        pass
    return batches * batch_size / (time.perf_counter() - began)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    count, batch_size = flags.FLAGS.images, flags.FLAGS.batch_size
    directory = Path(tempfile.mkdtemp(prefix='photographs_'))
    try:
        Photographs(data_dir=str(directory)).download_and_prepare(file_format='array_record')
        options = ImageOptions(image_size=flags.FLAGS.image_size, test_split='validation')
        images = load_images(Photographs.name, str(directory), options)
        variants: dict[str, tuple[int, Callable[[], float]]] = {'bare loop': (1, lambda: bare_loop(images, count))}
        for workers in map(int, flags.FLAGS.workers):
            split = Split(images.train, None, workers, images.crop)
            cores = min(workers, os.cpu_count() or 1) if workers else os.cpu_count() or 1
            name = f'{workers} workers' if workers else 'threads of the process'
            variants[name] = (cores, functools.partial(pipeline, split, batch_size, count // batch_size))
        speeds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(flags.FLAGS.rounds):
            for name, (_, read) in variants.items():
                speeds[name].append(read())
    finally:
        shutil.rmtree(directory)
    bare = statistics.median(speeds['bare loop'])
    print('| | cores | images/s | images/s and core | against the bare loop |\n|---|---|---|---|---|')
    for name, (cores, _) in variants.items():
        speed = statistics.median(speeds[name])
        print(f'| {name} | {cores} | {speed:.0f} | {speed / cores:.0f} | {speed / cores / bare:.2f} |')


if __name__ == '__main__':
    flags.DEFINE_integer('images', 1024, 'Images per round, at least one batch.', lower_bound=1)
    flags.DEFINE_integer('rounds', 5, 'Rounds.', lower_bound=1)
    flags.DEFINE_integer('batch_size', 128, 'Images per batch.', lower_bound=1)
    flags.DEFINE_integer('image_size', 224, 'Crop size in pixels.', lower_bound=1)
    flags.DEFINE_list('workers', ['0', '1', '2'], 'Numbers of worker processes; 0 for threads.')
    app.run(main)
