"""Data sets of tokens and of labelled pixels."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from bqat_jax.data import python_bytes
from bqat_jax.data.digits_segmentation import draw_canvas
from bqat_jax.data.examples import ExampleFormat, TokenFormat, WrongExample
from bqat_jax.data.features import check_tokens
from bqat_jax.data.pipeline import Split, read_whole
from bqat_jax.data.preprocessing import TokenPreprocessing
from bqat_jax.data.sources import ImageOptions, load_images
from bqat_jax.errors import UserError


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """A folder that stands for Python's library, and where the data set is prepared from it."""
    root = tmp_path_factory.mktemp('library')
    for number in range(60):
        (root / f'module{number}.py').write_text(f'# module {number}\n' + f'x = {number}\n' * 40)
    (root / 'latin.py').write_bytes(b'# \xe4' + b'x' * 200)
    (root / 'test').mkdir()
    (root / 'test' / 'module.py').write_text('y' * 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_bytes, 'library_folder', lambda: root)
        directory = str(tmp_path_factory.mktemp('data'))
        yield root, load_images('python_bytes', directory, ImageOptions(validation_split='validation'))


def test_files_are_whole_in_one_split(library):
    root, data = library
    texts = python_bytes.read_texts(root)
    assert sorted(texts) == sorted(f'module{number}.py' for number in range(60))  # no tests, nothing but UTF-8
    for name in ('train', 'validation', 'test'):
        read = {bytes(example['tokens']) for example in getattr(data, name).read(slice(None))}
        expected = set()
        for text in (text for path, text in texts.items() if python_bytes.find_split(path) == name):
            expected |= {text[start : start + 65] for start in range(0, len(text) - 64, 64)}
        assert read == expected and expected
    assert data.description['files'] == 60 and set(data.description) == {'python', 'files', 'bytes', 'sha256'}
    assert (data.inputs, data.num_classes) == (jax.ShapeDtypeStruct((64,), np.int32), 256)


def test_targets_are_the_next_tokens(library):
    _, data = library
    arrays = read_whole(data.train)
    on_device, decoded = Split(data.train, arrays), Split(data.train, None)
    for split in (on_device, decoded):
        (batch,) = split.training_batches(0, 8, 3, 4)
        inputs, targets = TokenPreprocessing()(jax.tree.map(jnp.asarray, batch), split.arrays, None)
        assert inputs.dtype == targets.dtype == jnp.int32 and inputs.shape == (8, 64)
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize(
    'feature',
    [
        tfds.features.Tensor(shape=(65,), dtype=np.int32),
        tfds.features.Tensor(shape=(None,), dtype=np.uint8),
        tfds.features.Text(),
    ],
)
def test_tokens_of_another_kind_are_refused(feature):
    with pytest.raises(UserError, match='Tensor of uint8'):
        check_tokens('mine', tfds.features.FeaturesDict({'tokens': feature}))
    with pytest.raises(WrongExample, match='declares uint8'):
        TokenFormat(256, 4).read({'tokens': np.zeros(5, np.uint8)})


def test_pixels_have_the_labels_of_their_digits(tmp_path):
    class Digits:
        images = np.full((2, 8, 8), 16.0)
        target = np.array([3, 7])

    image, label = draw_canvas(Digits, [0, 1], np.random.default_rng(1))
    assert set(np.unique(label)) <= {0, 4, 8} and (label > 0).sum() % 64 == 0
    np.testing.assert_array_equal(label > 0, image == 255)
    data = load_images('digits_segmentation', str(tmp_path), ImageOptions(validation_fraction=0.1))
    assert (len(data.train), len(data.validation), len(data.test)) == (3600, 400, 800)
    assert (data.image_shape, data.label_shape, data.num_classes) == ((16, 16, 1), (16, 16), 11)
    example = data.train[5]
    assert example['label'].dtype == np.int32
    assert (example['image'][example['label'] > 0] > 0).all()


def test_labels_of_pixels_are_checked():
    form = ExampleFormat(3, np.dtype('uint8'), False, (2, 2, 1), None, (2, 2))
    for labels, message in ((np.full((2, 2), 3), 'up to 3'), (np.zeros((2, 3)), r'shape \(2, 3\)')):
        with pytest.raises(WrongExample, match=message):
            form.read({'image': np.zeros((2, 2, 1), np.uint8), 'label': encode(labels)})
    labels = np.array([[0, 255], [2, 1]])  # 255: nothing is labelled there
    form = dataclasses.replace(form, ignore=255)
    read = form.read({'image': np.zeros((2, 2, 1), np.uint8), 'label': encode(labels)})
    np.testing.assert_array_equal(read['label'], labels)


def encode(labels):
    encoded = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8)).save(encoded, format='PNG')
    return encoded.getvalue()


def test_a_validation_split_excludes_a_fraction_and_overlaps(library, tmp_path):
    with pytest.raises(UserError, match='Leave the other out'):
        load_images('digits', str(tmp_path), ImageOptions(validation_split='train[90%:]', validation_fraction=0.1))
    with pytest.raises(UserError, match='are in both'):
        load_images('digits', str(tmp_path), ImageOptions(validation_split='train[90%:]'))
    data = load_images('digits', str(tmp_path), ImageOptions(train_split='train[:90%]', validation_split='train[90%:]'))
    assert len(data.train) + len(data.validation) == 1437
