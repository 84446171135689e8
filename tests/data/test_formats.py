"""What data sets declare and hold that is not uint8 images with one label each: read rightly, or refused."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bqat_jax.data.augmentation import adjust_colors, normalize, random_crop
from bqat_jax.data.crops import Crop
from bqat_jax.data.examples import ExampleFormat, WrongExample, scale
from bqat_jax.data.features import check_features
from bqat_jax.data.pipeline import Split, read_whole
from bqat_jax.data.preprocessing import Augmentation, Preprocessing
from bqat_jax.data.sources import SAMPLE, ImageOptions, Subset, load_images
from bqat_jax.errors import UserError
from tests.data.made import LABEL, examples, png, prepare, tensor

GENERATOR = np.random.default_rng(0)
BYTES = GENERATOR.integers(0, 256, (12, 4, 4, 3)).astype(np.uint8)
BYTES[0, 0, 0], BYTES[0, 0, 1] = 0, 255


def opened(directory, feature, train, test=None, **options):
    """A prepared and opened data set."""
    prepare(directory, feature, {'train': train, 'test': train if test is None else test})
    return load_images('made', str(directory), ImageOptions(**options))


@pytest.mark.parametrize(
    ('dtype', 'stored', 'stated'),
    [
        ('float32', BYTES / 255, None),
        ('float32', BYTES / 255 * 2 - 1, None),
        ('float32', BYTES.astype(float), None),
        ('float64', BYTES / 255, None),
        ('int32', BYTES, None),
        ('float32', BYTES / 255 * 0.8 - 0.1, (-0.1, 0.7)),
        ('uint8', BYTES // 17, (0, 15)),
    ],
)
def test_images_of_other_ranges_are_scaled_to_0_to_1(dtype, stored, stated, tmp_path):
    images = opened(tmp_path, tensor(4, 4, 3, dtype=dtype), examples(stored.astype(dtype)), value_range=stated)
    expected = BYTES // 17 / 15 if stated == (0, 15) else BYTES / 255
    assert images.dtype == 'float32'
    arrays = read_whole(images.train)
    assert arrays['image'].dtype == np.float32 and arrays['image'].min() >= 0 and arrays['image'].max() <= 1
    np.testing.assert_allclose(arrays['image'], expected, atol=1e-6)
    (batch,) = Split(images.train, None).evaluation_batches(12)
    np.testing.assert_array_equal(batch['image'], arrays['image'])
    # Behind normalisation the network cannot tell which of them was stored.
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    got = normalize(jnp.asarray(arrays['image']), mean, std)
    np.testing.assert_allclose(got, (expected - mean) / std, atol=1e-5)


def test_the_range_that_was_found_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger='bqat_jax'):
        images = opened(tmp_path, tensor(4, 4, 3), examples((BYTES / 255 * 2 - 1).astype(np.float32)))
    assert images.value_range == (-1.0, 1.0)
    assert 'are assumed to go from -1 to 1' in caplog.text and 'data.value_range' in caplog.text


def test_bytes_stay_bytes_whatever_feature_they_are(tmp_path):
    for number, (feature, stored) in enumerate(
        [(tfds.features.Image(shape=(4, 4, 3)), list(map(png, BYTES))), (tensor(4, 4, 3, dtype='uint8'), BYTES)]
    ):
        for stated in (None, (0.0, 255.0)):
            folder = tmp_path / str(number) / str(stated)
            images = opened(folder, feature, examples(stored), value_range=stated)
            arrays = read_whole(images.train)
            assert images.dtype == 'uint8' and images.value_range is None and arrays['image'].dtype == np.uint8
            np.testing.assert_array_equal(arrays['image'], BYTES)


@pytest.mark.parametrize('encoded', [True, False])
def test_16_bits_are_kept(encoded, tmp_path):
    stored = GENERATOR.integers(0, 65536, (8, 4, 4, 1)).astype(np.uint16)
    feature = tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16) if encoded else tensor(4, 4, 1, dtype='uint16')
    images = opened(tmp_path, feature, examples([png(x[..., 0]) for x in stored] if encoded else stored))
    np.testing.assert_allclose(read_whole(images.train)['image'], stored / 65535, atol=1e-7)


def test_a_float_image_feature_is_the_bytes_of_a_png():
    stored = GENERATOR.uniform(0, 1, (4, 5, 1)).astype(np.float32)
    form = ExampleFormat(2, np.dtype(np.float32), True, (4, 5, 1), (0.0, 1.0))
    encoded = png(np.ascontiguousarray(stored).view(np.uint8))
    np.testing.assert_array_equal(form.read({'image': encoded, 'label': 1})['image'], stored)
    with pytest.raises(WrongExample, match='mode RGB'):
        form.read({'image': png(BYTES[0]), 'label': 1})


@pytest.mark.parametrize('wrong', [1.5, -0.25, np.nan, np.inf])
def test_what_is_outside_of_the_range_is_refused_by_number(wrong, tmp_path):
    stored = np.tile((BYTES / 255).astype(np.float32), (20, 1, 1, 1))
    images = opened(tmp_path, tensor(4, 4, 3), examples(stored), value_range=(0.0, 1.0))
    number = 101
    assert number not in np.linspace(0, len(stored) - 1, SAMPLE).astype(int)

    class Spoiled:
        def __getitem__(self, position):
            example = dict(images.train.source[position])
            if position == number:
                example['image'] = np.array(example['image'])
                example['image'][1, 2, 0] = wrong
            return example

    train = dataclasses.replace(images.train, source=Spoiled())
    message = f"Example {number} of split 'train' .record {number} of .*(NaN or infinity|go from .*value_range)"
    with pytest.raises(UserError, match=message):
        read_whole(train)
    for skips in (False, True):
        with pytest.raises(UserError, match=message):
            list(Split(train, None, skips_damaged=skips).evaluation_batches(16))


def test_ranges_that_are_none_of_the_common_must_be_stated(tmp_path):
    stored = (BYTES * 5.0).astype(np.float32)
    with pytest.raises(UserError, match=r'from 0 to 1275 in 12 training images.*--config\.data\.value_range'):
        opened(tmp_path, tensor(4, 4, 3), examples(stored))
    images = load_images('made', str(tmp_path), ImageOptions(value_range=(0.0, 1275.0)))
    assert read_whole(images.train)['image'].max() == 1
    for stated in ((1.0, 0.0), (0.0,), 'ab', (0.0, np.nan), 3):
        with pytest.raises(UserError, match=r'data\.value_range='):
            load_images('made', str(tmp_path), ImageOptions(value_range=stated))


@pytest.mark.parametrize('split', ['train', 'test'])
def test_labels_that_are_none_are_refused_when_it_is_opened(split, tmp_path):
    feature = {'image': tfds.features.Image(shape=(4, 4, 3)), 'label': LABEL}
    right = examples(list(map(png, BYTES)))
    wrong = [{**example, 'label': -1} for example in right]
    prepare(tmp_path, feature, {'train': right, 'test': right, split: wrong})
    with pytest.raises(UserError, match=rf"Example 0 of split '{split}' .*it has no label \(its 'label' is -1\)"):
        load_images('made', str(tmp_path))


@pytest.mark.parametrize('label', [-1, 3, 7])
def test_a_label_that_is_none_is_refused_when_it_is_read(label):
    class Source:
        def __getitem__(self, number):
            return {'image': BYTES[0], 'label': label if number == 5 else 2}

    form = ExampleFormat(3, np.dtype(np.uint8), False, (4, 4, 3))
    subset = Subset(Source(), np.arange(9), form, 'train')
    message = rf"Example 5 of split 'train' .*'label' is {label}.*labels are 0 to 2"
    with pytest.raises(UserError, match=message):
        read_whole(subset)
    for skips in (False, True):
        with pytest.raises(UserError, match=message):
            list(Split(subset, None, skips_damaged=skips).evaluation_batches(4))


IMAGE = tfds.features.Image(shape=(4, 4, 3))
REFUSED = {
    'scalar label': ({'image': IMAGE, 'label': tfds.features.Scalar(np.int64)}, "'label' is a Scalar .int64"),
    'text label': ({'image': IMAGE, 'label': tfds.features.Text()}, "'label' is a Text"),
    'several labels': ({'image': IMAGE, 'label': tfds.features.Sequence(LABEL)}, "'label' is a Sequence"),
    'one class': ({'image': IMAGE, 'label': tfds.features.ClassLabel(num_classes=1)}, 'of 1 classes'),
    'other names': ({'picture': IMAGE, 'label': LABEL}, "features .*picture.* needs 'image' and 'label'"),
    'no channels': (tensor(4, 4, dtype='uint8'), r"'image' is a Tensor .uint8, shape .4, 4..*without an axis"),
    'volumes': (tensor(4, 4, 4, 1), 'videos or volumes'),
    'video': (tfds.features.Sequence(IMAGE), "'image' is a Sequence"),
    'frames': (tfds.features.Image(shape=(None, 4, 4, 3)), 'videos or volumes'),
    'rgba': (tfds.features.Image(shape=(4, 4, 4)), 'with 4 channels.*without transparency'),
    'grey with alpha': (tfds.features.Image(shape=(4, 4, 2)), 'with 2 channels'),
    'rgba of many sizes': (tfds.features.Image(shape=(None, None, 4)), 'with 4 channels'),
    'tensors of many sizes': (tensor(None, None, 3), 'many sizes.*prepare it with images of one size'),
    'text': (tfds.features.Text(), "'image' is a Text"),
    'masks': (tfds.features.LabeledImage(labels=2, shape=(4, 4, 1)), "'image' is a LabeledImage"),
    '16 bits in colour': (tfds.features.Image(shape=(4, 4, 3), dtype=np.uint16), 'Pillow reads 16-bit files in colour'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_features_that_are_not_labelled_images_are_refused(case):
    features, message = REFUSED[case]
    features = features if isinstance(features, dict) else {'image': features, 'label': LABEL}
    with pytest.raises(UserError, match=f"data.name='made'.*{message}"):
        check_features('made', tfds.features.FeaturesDict(features), None, None)


@pytest.mark.parametrize(
    ('feature', 'message'),
    [
        (tfds.features.Image(shape=(None, None, 4)), 'with 4 channels'),
        (tfds.features.Image(shape=(None, None, 1), dtype=np.uint16), 'encoded 8-bit images'),
        (tensor(4, 4, 3, dtype='uint8'), 'encoded 8-bit images'),
        (tfds.features.Image(shape=(4, 4, 1), dtype=np.float32), 'encoded 8-bit images'),
    ],
)
def test_squares_are_cut_out_of_encoded_bytes_alone(feature, message):
    with pytest.raises(UserError, match=f'made.*{message}|image_size=8.*{message}'):
        check_features('made', tfds.features.FeaturesDict({'image': feature, 'label': LABEL}), 8, None)
    whole = tfds.features.FeaturesDict({'image': tfds.features.Image(), 'label': LABEL})
    with pytest.raises(UserError, match=r'data\.value_range='):
        check_features('made', whole, 8, (0.0, 1.0))


def test_the_features_of_a_prepared_data_set_are_looked_at(tmp_path):
    feature = {'image': IMAGE, 'label': tfds.features.Sequence(LABEL)}
    prepare(tmp_path, feature, {'train': examples([png(BYTES[0])], [[0, 1]]), 'test': examples([png(BYTES[0])], [[0]])})
    with pytest.raises(UserError, match="'label' is a Sequence"):
        load_images('made', str(tmp_path))


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (BYTES[0, :3], r'uint8 of shape \(3, 4, 3\)'),
        (BYTES[0, ..., 0], r'uint8 of shape \(4, 4, 1\)'),
        (np.concatenate([BYTES[0], BYTES[0, ..., :1]], -1), r'uint8 of shape \(4, 4, 4\)'),
        (np.full((4, 4), 40000, np.uint16), r'uint16 of shape \(4, 4, 1\)'),
    ],
)
def test_an_image_of_another_shape_is_refused_by_number(wrong, message, tmp_path):
    stored = [png(BYTES[0])] * 5
    match = rf"Example \d of split 'train' .*{message}, and the data set declares uint8 of shape \(4, 4, 3\)"
    with pytest.raises(UserError, match=match):
        opened(tmp_path, IMAGE, examples([*stored, png(wrong)]), test=examples(stored))


def test_palettes_and_single_bits_are_decoded_to_what_they_show():
    palette = Image.fromarray(BYTES[0]).quantize(256)
    form = ExampleFormat(2, np.dtype(np.uint8), True, (4, 4, 3))
    np.testing.assert_array_equal(form.pixels({'image': png(palette)}), np.asarray(palette.convert('RGB')))
    bits = GENERATOR.integers(0, 2, (4, 4)).astype(bool)
    form = ExampleFormat(2, np.dtype(np.uint8), True, (4, 4, 1))
    np.testing.assert_array_equal(form.pixels({'image': png(bits)})[..., 0], np.where(bits, 255, 0))


@pytest.mark.parametrize('skips', [False, True])
def test_squares_are_not_cut_out_of_16_bits(skips, tmp_path):
    deep = np.full((9, 9), 40000, np.uint16)
    feature = tfds.features.Image(shape=(None, None, 1))
    images = opened(tmp_path, feature, examples([png(deep)] * 4), image_size=8)
    with pytest.raises(UserError, match=r"Example 0 of split 'train' .*mode I;16, with more than 8 bits"):
        list(Split(images.train, None, 0, images.crop, skips_damaged=skips).evaluation_batches(4))
    with pytest.raises(WrongExample):
        Crop(8, 3).center(png(deep))


def test_bounds_that_float32_does_not_have_are_its_own():
    pixels = np.array([0.1, 0.7], np.float32)
    np.testing.assert_array_equal(scale(pixels, (0.1, 0.7)), [0, 1])


@pytest.mark.parametrize('factors', [(1.3, 0.6, 1.0), (0.5, 1.0, 1.7), (1.0, 1.8, 0.0), (2.0, 1.0, 1.0)])
def test_colours_of_floats_are_those_of_bytes(factors):
    arrays = [jnp.full((12, 1, 1, 1), factor) for factor in factors]
    got = adjust_colors(jnp.asarray(BYTES, jnp.float32) / 255, *arrays)
    assert got.dtype == jnp.float32
    assert np.abs(np.asarray(got) * 255 - np.asarray(adjust_colors(jnp.asarray(BYTES), *arrays))).max() <= 0.501


def test_floats_are_cropped_with_black_and_other_types_are_refused():
    ones = jnp.ones((16, 4, 4, 1), jnp.float32)
    cropped = np.asarray(random_crop(jax.random.key(0), ones, 2))
    assert set(np.unique(cropped)) == {0.0, 1.0}
    with pytest.raises(TypeError, match='int32'):
        normalize(jnp.ones((1, 4, 4, 1), jnp.int32), (0.5,), (0.5,))


def test_a_batch_of_floats_is_augmented_and_normalised_as_the_same_bytes():
    preprocessing = Preprocessing((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), Augmentation(1, True, 0.0))
    labels = jnp.zeros(12, jnp.int32)
    images = (jnp.asarray(BYTES), jnp.asarray(BYTES, jnp.float32) / 255)
    bytes_, floats = (preprocessing({'image': one, 'label': labels}, None, jax.random.key(1)).inputs for one in images)
    np.testing.assert_allclose(bytes_, floats, atol=1e-5)
