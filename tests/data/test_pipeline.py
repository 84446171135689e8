import jax
import numpy as np
import pytest

from bqat_jax.data.pipeline import Share, Split, read_whole
from bqat_jax.data.preprocessing import get_array
from bqat_jax.data.sources import ImageOptions, load_images
from bqat_jax.errors import UserError


@pytest.fixture(scope='module')
def images(digits_dir):
    return load_images('digits', digits_dir, ImageOptions(0.1))


@pytest.fixture(scope='module')
def splits(images):
    """The training split on the device, and read as it goes."""
    return Split(images.train, read_whole(images.train)), Split(images.train, None)


def test_digits_are_all_there_and_split_evenly(digits_dir):
    images = load_images('digits', digits_dir)
    assert (len(images.train), len(images.validation), len(images.test)) == (1437, 0, 360)
    assert images.num_classes == 10 and images.image_shape == (8, 8, 1)
    test = read_whole(images.test)
    assert test['image'].dtype == np.uint8 and test['image'].max() == 255 and test['image'].min() == 0
    assert np.bincount(test['label']).min() >= 34  # stratified


def test_digits_are_scikit_learns(digits_dir):
    from sklearn.datasets import load_digits

    images = load_images('digits', digits_dir)
    ours = np.concatenate([read_whole(split)['image'][..., 0] for split in (images.train, images.test)])
    theirs = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in ours) == sorted(image.tobytes() for image in theirs)


def test_validation_is_held_out_of_training(images):
    assert len(images.validation) == 144 and len(images.train) == 1293
    assert not set(images.train.positions.tolist()) & set(images.validation.positions.tolist())


@pytest.mark.parametrize('fraction', [-0.1, 1.0])
def test_bad_validation_fractions_are_refused(fraction, digits_dir):
    with pytest.raises(UserError, match='validation_fraction'):
        load_images('digits', digits_dir, ImageOptions(fraction))


def test_every_epoch_has_every_example_once_in_another_order(splits):
    on_device, _ = splits
    n = len(on_device)
    batches = list(on_device.training_batches(seed=1, batch_size=100, start=0, stop=2 * n // 100 + 1))
    order = np.concatenate([batch['index'] for batch in batches])
    first, second = order[:n], order[n : 2 * n]
    assert sorted(first) == sorted(second) == list(range(n))
    assert not np.array_equal(first, second)
    other = next(on_device.training_batches(seed=2, batch_size=100, start=0, stop=1))['index']
    assert not np.array_equal(other, first[:100])


def test_a_resumed_reading_goes_on_at_the_same_batch(splits):
    on_device, _ = splits
    whole = [batch['index'] for batch in on_device.training_batches(3, 64, 0, 50)]
    rest = [batch['index'] for batch in on_device.training_batches(3, 64, 33, 50)]
    np.testing.assert_array_equal(whole[33:], rest)


def shared_out(images, count, batch_size, start, stop):
    """The batches number `start` to `stop - 1`, each put together from the rows of `count` processes."""
    shares = [Split(images.train, {}, share=Share(number, count)) for number in range(count)]
    readings = [split.training_batches(3, batch_size, start, stop) for split in shares]
    return [np.concatenate([part['index'] for part in parts]) for parts in zip(*readings, strict=True)]


@pytest.mark.parametrize('count', [2, 4])
def test_processes_share_the_rows_of_the_same_batches(images, splits, count):
    whole = [batch['index'] for batch in splits[0].training_batches(3, 64, 5, 30)]
    np.testing.assert_array_equal(shared_out(images, count, 64, 5, 30), whole)
    evaluated = [
        list(Split(images.test, {}, share=Share(number, count)).evaluation_batches(64)) for number in range(count)
    ]
    seen = np.concatenate([batch['index'][batch['mask']] for own in evaluated for batch in own])
    assert sorted(seen) == list(range(len(images.test)))


def test_fewer_processes_go_on_so_that_every_example_of_the_epoch_is_seen_once(images):
    n = len(images.train)
    last = -(-n // 64)
    order = [*shared_out(images, 4, 64, 0, 9), *shared_out(images, 2, 64, 9, 13), *shared_out(images, 1, 64, 13, last)]
    assert sorted(np.concatenate(order)[:n]) == list(range(n))


def test_on_the_device_or_not_the_batches_are_the_same(splits):
    on_device, streamed = splits
    pairs = zip(on_device.training_batches(3, 64, 15, 25), streamed.training_batches(3, 64, 15, 25), strict=True)
    for left, right in pairs:
        image, label = (get_array(left, on_device.arrays, name) for name in ('image', 'label'))
        np.testing.assert_array_equal(image, right['image'])
        np.testing.assert_array_equal(label, right['label'])
        assert get_array(right, None, 'image') is right['image']


def test_workers_read_the_same_batches(images):
    direct = Split(images.train, None).training_batches(3, 64, 5, 12)
    workers = Split(images.train, None, workers=2).training_batches(3, 64, 5, 12)
    for left, right in zip(direct, workers, strict=True):
        jax.tree.map(np.testing.assert_array_equal, left, jax.tree.map(np.array, right))


@pytest.mark.parametrize('batch_size', [1, 7, 144, 500])
def test_evaluation_counts_every_example_once(images, batch_size):
    split = Split(images.validation, read_whole(images.validation))
    counts = np.zeros(len(split), int)
    for batch in split.evaluation_batches(batch_size):
        assert batch['index'].shape == (batch_size,)
        np.add.at(counts, batch['index'][batch['mask']], 1)
    assert (counts == 1).all()


def test_missing_datasets_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match='download_and_prepare'):
        load_images('cifar10', str(tmp_path))
    with pytest.raises(UserError, match='no dataset of that name'):
        load_images('cifar11', str(tmp_path))


def test_cifar10_is_read(shared_data):
    images = load_images('cifar10', str(shared_data / 'tfds'), ImageOptions(0.1))
    assert (len(images.train), len(images.validation), len(images.test)) == (45000, 5000, 10000)
    example = images.test[0]
    assert example['image'].shape == (32, 32, 3) and example['image'].dtype == np.uint8
