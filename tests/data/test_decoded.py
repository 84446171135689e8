"""Splits that are decoded once: the same to the bit, and made anew where anything differs that they depend on."""

import dataclasses
import logging
import shutil

import numpy as np
import pytest

from bqat_jax.data import decoded
from bqat_jax.data.decoded import describe_source, read_decoded
from bqat_jax.data.pipeline import read_whole
from bqat_jax.data.sources import ImageOptions, Subset, load_images
from bqat_jax.errors import UserError
from bqat_jax.storage import KeptArrays
from tests.data.made import examples, prepare, shards, tensor

IMAGES = np.random.default_rng(0).random((6, 4, 4, 3)).astype(np.float32)


@pytest.fixture
def kept(tmp_path):
    return KeptArrays(tmp_path / 'kept', 1e9)


@pytest.fixture
def readings(monkeypatch):
    """The splits that were decoded."""
    seen = []

    def read(source):
        seen.append(source)
        return read_whole(source)

    monkeypatch.setattr(decoded, 'read_whole', read)
    return seen


def made(directory, images=IMAGES):
    """The training split of a data set of float images."""
    splits = {'train': examples(images), 'test': examples(IMAGES[:2])}
    prepare(directory, tensor(4, 4, 3), splits)
    return load_images('made', str(directory)).train


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, strict=True)


@pytest.mark.parametrize('name', ['digits', 'digits_segmentation'])
def test_a_kept_split_is_the_decoded_one_to_the_bit(name, digits_dir, kept, readings):
    train = load_images(name, digits_dir, ImageOptions(train_examples=50)).train
    expected = read_whole(train)
    assert_same(read_decoded(train, kept), expected)
    again = load_images(name, digits_dir, ImageOptions(train_examples=50)).train  # another start opens it anew
    assert_same(read_decoded(again, kept), expected)
    assert len(readings) == 1


def test_nothing_is_kept_without_a_folder(digits_dir, readings):
    train = load_images('digits', digits_dir, ImageOptions(train_examples=5)).train
    assert_same(read_decoded(train, None), read_whole(train))


def test_other_examples_are_decoded_anew(digits_dir, kept, readings):
    images = load_images('digits', digits_dir, ImageOptions(0.1, train_examples=50))
    whole = load_images('digits', digits_dir, ImageOptions(train_examples=51))
    for split in (images.train, images.validation, whole.train, whole.test):
        assert_same(read_decoded(split, kept), read_whole(split))
    assert len(readings) == 4


def test_another_range_or_declaration_is_decoded_anew(tmp_path, kept, readings):
    split = made(tmp_path)
    first = read_decoded(split, kept)
    wider = dataclasses.replace(split, format=dataclasses.replace(split.format, value_range=(-1.0, 3.0)))
    assert not np.array_equal(read_decoded(wider, kept)['image'], first['image'])
    assert len(readings) == 2


def test_a_changed_data_set_is_decoded_anew(tmp_path, kept, readings):
    first = read_decoded(made(tmp_path), kept)
    shutil.rmtree(tmp_path / 'made')
    second = read_decoded(made(tmp_path, 1 - IMAGES), kept)
    assert len(readings) == 2 and not np.array_equal(first['image'], second['image'])
    split = load_images('made', str(tmp_path)).train
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes())  # as a copy of the same size would be
    assert_same(read_decoded(split, kept), second)
    assert len(readings) == 3


def test_a_cut_file_is_decoded_anew(digits_dir, kept, readings, caplog):
    train = load_images('digits', digits_dir, ImageOptions(train_examples=50)).train
    expected = read_decoded(train, kept)
    (path,) = kept.directory.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, 'bqat_jax'):
        assert_same(read_decoded(train, kept), expected)
    assert "'train' of digits/" in caplog.text and len(readings) == 2


def test_what_stops_decoding_stops_it_still(tmp_path, kept):
    split = made(tmp_path)
    narrow = dataclasses.replace(split, format=dataclasses.replace(split.format, value_range=(0.4, 0.5)))
    with pytest.raises(UserError, match='value_range'):
        read_decoded(narrow, kept)
    assert not kept.directory.exists()


def test_a_split_whose_files_are_not_known_is_not_kept(digits_dir):
    train = load_images('digits', digits_dir).train
    assert describe_source(train) is not None
    assert describe_source(Subset(train.source, train.positions, train.format)) is None
    assert describe_source(dataclasses.replace(train, files=(('gs://bucket/x', 0, 1),))) is None
    assert describe_source(dataclasses.replace(train, files=(('/nowhere/x', 0, 1),))) is None
