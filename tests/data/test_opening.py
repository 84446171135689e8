"""Names, slices, damaged files, and data sets that prepare themselves: what is wrong is told when they are opened."""

import dataclasses
import errno
import fcntl
import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds

from bqat_jax.data.pipeline import read_whole
from bqat_jax.data.sources import DATASETS, ImageOptions, load_images, register_dataset
from bqat_jax.errors import UserError
from bqat_jax.storage import wait_for_lock
from tests.conftest import ROOT
from tests.data.made import examples, png, prepare, shards

FEATURE = tfds.features.Image(shape=(4, 4, 1))
BYTES = np.arange(20 * 16).reshape(20, 4, 4).astype(np.uint8)
SPLITS = {'train': examples(list(map(png, BYTES))), 'test': examples(list(map(png, BYTES[:10])))}


@pytest.fixture(scope='session')
def made_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp('made')
    prepare(directory, FEATURE, SPLITS)
    return directory


@pytest.fixture
def made(made_once, tmp_path):
    """A copy of a prepared data set, to be damaged."""
    shutil.copytree(made_once, tmp_path / 'copy')
    return tmp_path / 'copy'


def test_slices_are_the_examples_that_tensorflow_datasets_says(made_once):
    whole = read_whole(load_images('made', str(made_once)).train)
    options = ImageOptions(train_split='train[:80%]', test_split='train[80%:]')
    images = load_images('made', str(made_once), options)
    assert (len(images.train), len(images.test)) == (16, 4)
    for subset, places in ((images.train, slice(16)), (images.test, slice(16, None))):
        np.testing.assert_array_equal(read_whole(subset)['image'], whole['image'][places])
    assert images.test.where(1).startswith('record 17 of ')
    assert len(load_images('made', str(made_once), ImageOptions(test_split='test[:50%]')).test) == 5


@pytest.mark.parametrize(
    ('train', 'test', 'message'),
    [
        ('train[:80%]', 'train[70%:]', '2 examples are in both'),
        ('train', 'train', '20 examples are in both'),
        ('train+test', 'test', '10 examples are in both'),
        ('train[:10]+train[5:20]', 'test', "data.train_split='train.:10.*5 examples more than once"),
        ('train', 'test[5:5]', "data.test_split='test.5:5.' has no examples"),
        ('train[:0%]', 'test', "data.train_split='train.:0%.' has no examples"),
        ('train', 'test[50%', "data.test_split='test.50%' is not a split"),
        ('train', 'test[abc]', 'is not a split'),
        ('train', 'test[90:99]', 'is not a split'),
        ('train', 'test[200%:]', 'is not a split'),
        ('', 'test', "data.train_split='' is not a split"),
        ('train', 'validation', "data.test_split='validation' is not a split.*The splits of 'made': test, train"),
    ],
)
def test_slices_that_cannot_be_are_refused(train, test, message, made_once):
    with pytest.raises(UserError, match=message):
        load_images('made', str(made_once), ImageOptions(train_split=train, test_split=test))


@pytest.mark.parametrize('fraction', [0.01, 0.99])
def test_a_fraction_leaves_something_on_both_sides(fraction, made_once):
    with pytest.raises(UserError, match=f'validation_fraction={fraction} of 20 training images'):
        load_images('made', str(made_once), ImageOptions(fraction))


@pytest.mark.parametrize(
    'name',
    [
        'mnist:9.9.9',
        'imagenette/bad',
        '',
        'a/b/c',
        '../x',
        '/tmp',
        'Digits',
        'mnist',
        'digits:9.9.9',
        'digits/x',
        'a:b',
    ],
)
def test_names_that_are_none_are_told(name, tmp_path):
    with pytest.raises(UserError, match=f'^data.name={name!r}'):
        load_images(name, str(tmp_path))


def test_a_name_in_other_letters_is_suggested(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'digits'"):
        load_images('Digits', str(tmp_path))


@pytest.mark.parametrize('name', ['digits', 'mnist'])
def test_a_directory_that_is_none_is_told(name, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'data.dir=.*is a file.*--config\.data\.dir'):
        load_images(name, str(tmp_path / 'file'))


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r"data.name='digits' cannot be prepared .*can be written .--config\.data\.dir"):
        load_images('digits', str(tmp_path / 'file' / 'below'))


def test_a_home_that_cannot_be_written_is_told():
    code = "from bqat_jax.data.sources import load_images; load_images('digits', None)"
    environment = {'HOME': '/dev/null', 'PATH': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    run = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert "UserError: data.name='digits' cannot be prepared in /dev/null/" in last
    assert last.endswith('Use a folder that can be written (--config.data.dir=DIR).')


def test_a_directory_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def refuse(*_, **options):
        raise PermissionError(errno.EACCES, 'Permission denied', str(options['data_dir']))

    monkeypatch.setattr(tfds, 'builder', refuse)
    with pytest.raises(UserError, match=r"data\.name='made' cannot be opened .*PermissionError.*--config\.data\.dir"):
        load_images('made', str(tmp_path))


def test_a_record_that_cannot_be_read_is_named_when_all_are_read(made):
    """Also where it is one of a run that is read at once."""
    images = load_images('made', str(made))

    class Spoiled:
        def __getitems__(self, positions):
            return [self[position] for position in positions]

        def __getitem__(self, position):
            if position == 7:
                raise RuntimeError('Corrupted')
            return images.train.source[position]

    with pytest.raises(UserError, match=r'^Record 7 of .*made-train.* cannot be read: RuntimeError: Corrupted\. Copy'):
        read_whole(dataclasses.replace(images.train, source=Spoiled()))


def test_a_missing_directory_is_told(tmp_path):
    with pytest.raises(UserError, match=r'holds none.*--config\.data\.dir'):
        load_images('made', str(tmp_path / 'missing'))


def cut(path, size=None):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if size is None else size])


def change_lengths(path, change):
    info = json.loads(path.read_text())
    for split in info['splits']:
        split['shardLengths'] = [str(int(length) + change) for length in split['shardLengths']]
    path.write_text(json.dumps(info))


DAMAGES = {
    'info cut': (lambda folder, shard: cut(folder / 'dataset_info.json'), "data.name='made' cannot be opened"),
    'info empty': (lambda folder, shard: cut(folder / 'dataset_info.json', 0), "data.name='made'"),
    'info missing': (lambda folder, shard: (folder / 'dataset_info.json').unlink(), "data.name='made'"),
    'features cut': (lambda folder, shard: cut(folder / 'features.json'), 'made.*(features.json|cannot be opened)'),
    'features missing': (lambda folder, shard: (folder / 'features.json').unlink(), 'features.json'),
    'shard missing': (lambda folder, shard: shard.unlink(), 'made-train.*cannot be read.*missing or damaged'),
    'shard cut': (lambda folder, shard: cut(shard), 'made-train.*cannot be read.*missing or damaged'),
    'shard empty': (lambda folder, shard: cut(shard, 0), 'made-train.*cannot be read.*missing or damaged'),
    'another shard': (
        lambda folder, shard: shutil.copy(shards(folder.parent.parent, 'test')[0], shard),
        'made-train.* has 10 records, and dataset_info.json beside it says 20',
    ),
    'too few': (lambda folder, shard: change_lengths(folder / 'dataset_info.json', 3), 'has 20 records.* says 23'),
    'too many': (lambda folder, shard: change_lengths(folder / 'dataset_info.json', -3), 'has 20 records.* says 17'),
}


@pytest.mark.parametrize('registered', [False, True])
@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_files_are_told(damage, registered, made, registries):
    spoil, message = DAMAGES[damage]
    (shard,) = shards(made)
    spoil(made / 'made' / '1.0.0', shard)
    if registered:
        prepare(made, FEATURE, SPLITS, register=register_dataset)
    with pytest.raises(UserError, match=message):
        load_images('made', str(made))


@pytest.mark.parametrize('registered', [False, True])
def test_another_file_format_is_told(registered, made, registries):
    path = made / 'made' / '1.0.0' / 'dataset_info.json'
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    if registered:
        prepare(made, FEATURE, SPLITS, register=register_dataset)
    with pytest.raises(UserError, match=r"data\.name='made' is .*prepared as .*tfrecord"):
        load_images('made', str(made))


def test_features_that_need_tensorflow_are_told(made):
    path = made / 'made' / '1.0.0' / 'features.json'
    described = json.loads(path.read_text())
    described['featuresDict']['features']['image'] = {
        'pythonClassName': 'tensorflow_datasets.core.features.video_feature.Video',
        'video': {'shape': {'dimensions': ['-1', '4', '4', '3']}, 'dtype': 'uint8', 'encodingFormat': 'png'},
    }
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"data\.name='made'.*one of its features needs a package"):
        load_images('made', str(made))


def test_an_empty_split_is_told(tmp_path, registries):
    prepare(tmp_path, FEATURE, {**SPLITS, 'test': []}, register=register_dataset)
    with pytest.raises(UserError, match=r"made'.*(no examples|cannot be prepared)"):
        load_images('made', str(tmp_path))


def test_a_builder_that_fails_is_told(tmp_path, registries):
    def fail():
        yield SPLITS['train'][0]
        raise KeyError('nothing of that name')

    prepare(tmp_path, FEATURE, {'train': fail, 'test': SPLITS['test']}, register=register_dataset)
    with pytest.raises(
        UserError, match=r"data\.name='made' cannot be prepared .*nothing of that name.*Correct tests.data"
    ):
        load_images('made', str(tmp_path))


def test_a_read_only_folder_with_a_prepared_data_set_is_enough(made, registries):
    prepare(made, FEATURE, SPLITS, register=register_dataset)
    load_images('made', str(made))
    assert not list(made.rglob('*.lock'))


def test_several_first_runs_at_once_prepare_once(tmp_path):
    """A fresh home for all of them."""
    code = "from bqat_jax.data.sources import load_images; print(len(load_images('digits', None).train))"
    environment = {'HOME': str(tmp_path), 'PATH': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-c', code]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [output for output, _ in outputs] and all(output.endswith('1437\n') for output, _ in outputs), outputs
    assert sum('Downloading and preparing' in output for output, _ in outputs) == 1


def test_without_locks_the_quicker_of_two_is_taken(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, 'no locks here')

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    builder = DATASETS.get('digits')

    def lose(self, **options):
        original(self, **options)
        raise FileExistsError('another process was quicker')

    original = builder.download_and_prepare
    monkeypatch.setattr(builder, 'download_and_prepare', lose)
    assert len(load_images('digits', str(tmp_path)).train) == 1437


def test_a_lock_is_waited_for(tmp_path):
    path, order = tmp_path / 'lock', []

    def second():
        with wait_for_lock(path):
            order.append('second')

    with wait_for_lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        order.append('first')
    thread.join(10)
    assert order == ['first', 'second']
