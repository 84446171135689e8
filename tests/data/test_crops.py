import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bqat_jax.data.crops import AREA, RATIO, Crop, random_box
from bqat_jax.data.pipeline import Split
from bqat_jax.data.sources import ImageOptions, Subset, load_images
from bqat_jax.errors import UserError


def encode(pixels, kind='PNG'):
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format=kind, quality=95)
    return encoded.getvalue()


class Photos(tfds.core.GeneratorBasedBuilder):
    """Photographs of many sizes: smooth colours, JPEG."""

    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {'image': tfds.features.Image(encoding_format='jpeg'), 'label': tfds.features.ClassLabel(num_classes=3)}
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {'train': self._generate_examples(30), 'validation': self._generate_examples(7)}

    def _generate_examples(self, count):
        generator = np.random.default_rng(count)
        for number in range(count):
            width, height = generator.integers(40, 300, 2)
            pixels = np.full((height, width, 3), generator.integers(0, 256, 3), np.uint8)
            yield number, {'image': io.BytesIO(encode(pixels, 'JPEG')), 'label': number % 3}


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Where the photographs are prepared."""
    directory = tmp_path_factory.mktemp('photos')
    Photos(data_dir=str(directory)).download_and_prepare(file_format='array_record')
    return str(directory)


def test_boxes_have_the_areas_and_ratios_of_the_paper():
    generator = np.random.default_rng(0)
    boxes = np.array([random_box(generator, 400, 300) for _ in range(2000)])
    left, top, width, height = boxes.T
    assert left.min() >= 0 and top.min() >= 0
    assert (left + width).max() <= 400 and (top + height).max() <= 300
    areas, ratios = width * height / (400 * 300), width / height
    assert areas.min() > AREA[0] * 0.97 and areas.max() <= 1 and areas.min() < 0.1 and areas.max() > 0.9
    assert ratios.min() > RATIO[0] * 0.97 and ratios.max() < RATIO[1] * 1.03


def test_the_middle_of_what_is_too_long():
    class Unlucky:
        def uniform(self, low, high):
            return high

    assert random_box(Unlucky(), 1000, 10) == (493, 0, 13, 10)
    assert random_box(Unlucky(), 10, 1000) == (0, 493, 10, 13)


def test_the_centre_is_that_of_resize_256_crop_224():
    """A ramp: the crop's values are the ramp's over the middle 224/256 of the short side."""
    across = np.tile(np.linspace(0, 255, 512, dtype=np.float32), (256, 1)).round().astype(np.uint8)
    got = Crop(224, 1).center(encode(across)).astype(np.float32)
    assert got.shape == (224, 224, 1)
    expected = across[0, 256 - 112 : 256 + 112].astype(np.float32)
    np.testing.assert_allclose(got[100, :, 0], expected, atol=1.01)


@pytest.mark.parametrize('size', [(32, 24), (640, 480)])
def test_a_random_crop_is_the_resized_box(size):
    generator = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, x], axis=-1).round().astype(np.uint8)
    got = Crop(16, 3).random(encode(pixels, 'JPEG'), generator).astype(np.float32)
    left, top, width, height = random_box(np.random.default_rng(0), *size)
    centres = (np.arange(16) + 0.5) / 16
    np.testing.assert_allclose(got[8, :, 0], (left + centres * width) / size[0] * 255, atol=10)
    np.testing.assert_allclose(got[:, 8, 1], (top + centres * height) / size[1] * 255, atol=10)


def test_grey_and_palette_images_become_what_is_asked_for():
    grey = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    assert Crop(8, 3).center(encode(grey)).shape == (8, 8, 3)
    assert Crop(8, 1).center(encode(np.stack([grey] * 3, -1))).shape == (8, 8, 1)


def test_photographs_are_read_in_squares(photos):
    images = load_images('photos', photos, ImageOptions(0.2, 32, test_split='validation'))
    assert images.image_shape == (32, 32, 3) and images.num_classes == 3
    assert (len(images.train), len(images.validation), len(images.test)) == (24, 6, 7)
    split = Split(images.train, None, 0, images.crop)
    read = [list(split.training_batches(0, 8, start, 6)) for start in (0, 0, 3)]
    assert read[0][0]['image'].shape == (8, 32, 32, 3) and read[0][0]['image'].dtype == np.uint8
    for first, second in zip(read[0], read[1], strict=True):
        np.testing.assert_array_equal(first['image'], second['image'])
    for first, resumed in zip(read[0][3:], read[2], strict=True):
        np.testing.assert_array_equal(first['image'], resumed['image'])
    batches = list(Split(images.test, None, 0, images.crop).evaluation_batches(4))
    assert sum(int(batch['mask'].sum()) for batch in batches) == 7


def test_crops_differ_from_epoch_to_epoch_and_not_where_they_are_of_the_centre():
    generator = np.random.default_rng(0)
    encoded = encode(generator.integers(0, 256, (40, 40, 3)).astype(np.uint8))

    class Same:
        positions = np.arange(2)

        def __len__(self):
            return 2

        def __getitem__(self, number):
            return {'image': encoded, 'label': 0}

    split = Split(Same(), None, 0, Crop(8, 3))
    first, second = (batch['image'] for batch in split.training_batches(0, 1, 0, 2))
    assert not np.array_equal(first, second)
    first, second = (batch['image'] for batch in split.training_batches(0, 1, 0, 2, random_crops=False))
    np.testing.assert_array_equal(first, second)


def test_a_damaged_image_is_named():
    class Damaged:
        positions = np.array([41])

        def __len__(self):
            return 1

        def __getitem__(self, number):
            return {'image': b'no image', 'label': 0}

        def where(self, number):
            return f'record {self.positions[number]} of a file'

    with pytest.raises(UserError, match='Record 41 of a file cannot be read: UnidentifiedImageError'):
        list(Split(Damaged(), None, 0, Crop(8, 3)).evaluation_batches(1))


@pytest.fixture
def damaged(tmp_path):
    """Photographs, and their file, of which one record does not have the checksum that it should."""
    builder = Photos(data_dir=str(tmp_path))
    builder.download_and_prepare(file_format='array_record')
    (path,) = builder.data_path.glob('*train.array_record*')
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content)) if content[at : at + 3] == b'\xff\xd8\xff']
    content[starts[1] + 20] ^= 0xFF
    path.write_bytes(content)
    return load_images('photos', str(tmp_path), ImageOptions(0.0, 16, test_split='validation')), str(path)


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_record_is_named_or_skipped_and_counted(damaged, workers):
    images, path = damaged
    with pytest.raises(Exception, match=f'ecord 1 of {path} cannot be read: RuntimeError: Corrupted'):
        list(Split(images.train, None, workers, images.crop).evaluation_batches(8))
    split = Split(images.train, None, workers, images.crop, skips_damaged=True)
    batches = list(split.evaluation_batches(8))
    assert sum(int(np.asarray(batch['mask']).sum()) for batch in batches) == 29
    assert split.damaged == {f'record 1 of {path}'}
    for batch in split.training_batches(0, 10, 0, 3):  # an epoch
        assert batch['image'].shape == (10, 16, 16, 3) and np.asarray(batch['mask']).all() and 'damaged' not in batch


def test_a_file_that_is_cut_short_is_named(tmp_path):
    builder = Photos(data_dir=str(tmp_path))
    builder.download_and_prepare(file_format='array_record')
    (path,) = builder.data_path.glob('*train.array_record*')
    path.write_bytes(path.read_bytes()[:70_000])
    with pytest.raises(UserError, match=f'{path} cannot be read'):
        load_images('photos', str(tmp_path), ImageOptions(image_size=16, test_split='validation'))


def test_where_nothing_can_be_read_skipping_ends():
    class Unreadable:
        def __getitem__(self, position):
            raise RuntimeError('gone')

    subset = Subset(Unreadable(), np.arange(20))
    with pytest.raises(UserError, match='10 consecutive examples cannot be read'):
        list(Split(subset, None, 0, Crop(8, 3), skips_damaged=True).evaluation_batches(8))


def test_many_sizes_need_a_size_and_splits_a_name(photos):
    with pytest.raises(UserError, match='image_size=224'):
        load_images('photos', photos, ImageOptions(test_split='validation'))
    with pytest.raises(UserError, match="The splits of 'photos': train, validation"):
        load_images('photos', photos, ImageOptions(image_size=32))
    with pytest.raises(UserError, match='image_size=0'):
        load_images('photos', photos, ImageOptions(image_size=0, test_split='validation'))
