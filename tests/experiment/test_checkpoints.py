import gc
import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.checkpoints import Checkpoints
from bqat_jax.experiment.integrity import digest
from tests.conftest import ROOT

# When Orbax gives up on a damaged file it leaves coroutines behind that complain as they are collected.
pytestmark = [
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
    pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning'),
]


@pytest.fixture(autouse=True)
def collect_garbage():
    gc.freeze()  # of what other tests left there is much, and it need not be looked at
    yield
    gc.collect()
    gc.unfreeze()


STATE = {
    'weights': jax.random.normal(jax.random.key(1), (300, 70)),
    'half': jnp.arange(6, dtype=jnp.bfloat16),
    'step': jnp.int32(3),
    'key': jax.random.key(5),
    'mask': jnp.array([True, False]),
    'stem/conv': {'step_size': jnp.float32(0.1)},
}


def target(tree=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree or STATE)


def assert_same(got, expected):
    def same(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, got, expected)


def numbered(step):
    return {**STATE, 'step': jnp.int32(step)}


def fill(directory, steps, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, numbered(step), {'next_batch': step}, 0.5 if options.get('has_scores') else None)


def test_everything_comes_back(tmp_path):
    fill(tmp_path / 'c', [7])
    with Checkpoints(tmp_path / 'c') as checkpoints:
        restored = checkpoints.restore_latest(target())
    assert restored.step == 7 and restored.facts == {'next_batch': 7}
    assert_same(restored.state, numbered(7))


def test_an_empty_directory_gives_none(tmp_path):
    with Checkpoints(tmp_path / 'c') as checkpoints:
        assert checkpoints.restore_latest(target()) is None
        assert checkpoints.restore_selected(target()) is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.5, 5: 0.1}
    for step, score in scores.items():  # opened anew each time: scores outlive the process
        with Checkpoints(tmp_path / 'c', keep=2, has_scores=True) as checkpoints:
            checkpoints.save(step, numbered(step), {}, score)
    assert sorted(int(p.name) for p in (tmp_path / 'c').iterdir()) == [2, 4, 5]
    with Checkpoints(tmp_path / 'c', keep=2, has_scores=True) as checkpoints:
        assert checkpoints.restore_selected(target()).step == 2
        assert checkpoints.restore_latest(target()).step == 5


def test_without_scores_the_last_counts(tmp_path):
    fill(tmp_path / 'c', [1, 2, 3], keep=2)
    with Checkpoints(tmp_path / 'c', keep=2) as checkpoints:
        assert checkpoints.restore_selected(target()).step == 3


def files_of(directory):
    return sorted(path for path in directory.rglob('*') if path.is_file() and path.stat().st_size)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == 'flip':
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
    elif how == 'cut':
        path.write_bytes(content[: len(content) // 2])
    elif how == 'zero':
        path.write_bytes(bytes(len(content)))
    else:
        path.unlink()


@pytest.mark.parametrize(
    'how', ['flip', *(pytest.param(how, marks=pytest.mark.slow) for how in ('cut', 'delete', 'zero'))]
)
def test_whatever_is_damaged_what_is_restored_is_right(tmp_path, how, caplog):
    """Each file of the newest checkpoint in turn: either it is read as it was, or the one before is used."""
    options = {'keep': 2, 'has_scores': True}
    fill(tmp_path / 'whole', [1, 2], **options)
    skipped = 0
    for number, file in enumerate(files_of(tmp_path / 'whole' / '2')):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / 'whole', run / 'c')
        damage(run / 'c' / file.relative_to(tmp_path / 'whole'), how)
        with caplog.at_level(logging.WARNING), Checkpoints(run / 'c', **options) as checkpoints:
            restored = checkpoints.restore_latest(target())
            assert_same(restored.state, numbered(restored.step))
            assert restored.facts == {'next_batch': restored.step}
            if restored.step == 1:
                skipped += 1
                assert 'step 2' in caplog.text and 'damaged' in caplog.text
                assert [path.name for path in (run / 'damaged').iterdir()] == ['2-0']
                checkpoints.save(2, numbered(2), {'next_batch': 2}, 0.7)  # its number is free again
                checkpoints.wait()
                assert checkpoints.restore_latest(target()).step == 2
    assert skipped > 0


def test_an_unfinished_save_does_not_count(tmp_path):
    fill(tmp_path / 'c', [1, 2], keep=2)
    (tmp_path / 'c' / '2').rename(tmp_path / 'c' / '2.orbax-checkpoint-tmp')
    with Checkpoints(tmp_path / 'c', keep=2) as checkpoints:
        assert checkpoints.restore_latest(target()).step == 1


def test_if_none_is_intact_it_says_so_and_touches_nothing(tmp_path):
    fill(tmp_path / 'c', [1, 2], keep=2)
    for file in files_of(tmp_path / 'c'):
        damage(file, 'cut')
    with Checkpoints(tmp_path / 'c', keep=2) as checkpoints, pytest.raises(UserError, match='step 2'):
        checkpoints.restore_latest(target())
    assert (tmp_path / 'c' / '2').is_dir()


def test_a_damaged_score_is_told_where_nothing_may_be_moved(tmp_path):
    fill(tmp_path / 'c', [1, 2], keep=2, has_scores=True)
    damage(tmp_path / 'c' / '2' / 'metrics' / 'metrics', 'cut')
    with pytest.raises(UserError, match='score is not readable'):
        Checkpoints(tmp_path / 'c', has_scores=True, read_only=True)


def test_read_only_moves_nothing(tmp_path):
    fill(tmp_path / 'c', [1, 2], keep=2)
    for file in files_of(tmp_path / 'c' / '2'):
        damage(file, 'cut')
    with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
        assert checkpoints.restore_latest(target()).step == 1
    assert (tmp_path / 'c' / '2').is_dir() and not (tmp_path / 'damaged').exists()


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    state = {'x': jax.random.normal(jax.random.key(0), (2000, 500))}
    expected = np.array(state['x'])
    overwrite = jax.jit(lambda state: {'x': state['x'] * 0 - 1}, donate_argnums=0)
    where = target(state)
    with Checkpoints(tmp_path / 'c') as checkpoints:
        checkpoints.save(0, state, {})
        for _ in range(20):
            state = overwrite(state)
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore_latest(where).state['x'], expected)


def test_what_cannot_be_written_is_told(tmp_path):
    with Checkpoints(tmp_path / 'c') as checkpoints:
        checkpoints.save(1, STATE, {})
        checkpoints.wait()
        with pytest.raises(UserError, match='could not be written'):
            checkpoints.save(1, STATE, {})  # its number is taken


@pytest.mark.parametrize('name', STATE)
def test_every_bit_enters_the_digest(name):
    leaf = jax.tree.leaves(STATE[name])[0]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    before = np.asarray(digest([leaf]))
    raw = np.array(leaf)
    rng = np.random.default_rng(0)
    for _ in range(20):
        changed = raw.copy().reshape(-1)
        position = rng.integers(changed.size)
        if raw.dtype == bool:
            changed[position] ^= True
        else:
            view = changed.view(f'uint{8 * raw.dtype.itemsize}')
            view[position] ^= view.dtype.type(1 << int(rng.integers(8 * raw.dtype.itemsize)))
        assert not np.array_equal(digest([jnp.asarray(changed.reshape(raw.shape))]), before)


def test_a_selected_checkpoint_that_is_damaged_is_an_error_and_no_other_is_taken(tmp_path):
    options = {'keep': 2, 'has_scores': True}
    with Checkpoints(tmp_path / 'c', **options) as checkpoints:
        for step, score in ((1, 0.5), (2, 0.9), (3, 0.1)):
            checkpoints.save(step, numbered(step), {}, score)
    for file in files_of(tmp_path / 'c' / '2' / 'state' / 'd'):
        damage(file, 'cut')
    with Checkpoints(tmp_path / 'c', **options) as checkpoints:
        with pytest.raises(
            UserError, match=r'selected checkpoint, step 2 in .*, is damaged: one of its files is missing, trunc'
        ):
            checkpoints.restore_selected(target())
        assert checkpoints.restore_latest(target()).step == 3
    assert (tmp_path / 'c' / '2').is_dir()


def test_other_arrays_are_told_by_name_and_not_called_damaged(tmp_path):
    fill(tmp_path / 'c', [1, 2], keep=2)
    other = target({**STATE, 'half': jnp.zeros(7, jnp.bfloat16), 'more': jnp.float32(0)})
    del other['mask']
    with Checkpoints(tmp_path / 'c', keep=2) as checkpoints:
        for restore in (checkpoints.restore_latest, checkpoints.restore_selected):
            with pytest.raises(UserError) as error:
                restore(other)
            message = str(error.value)
            assert 'do not fit this config' in message and 'damaged' not in message
            for part in ('more: not in the checkpoint', 'mask: not in the config', r'half: bfloat16[6] in the'):
                assert part in message
        assert checkpoints.restore_latest(target()).step == 2
    assert not (tmp_path / 'damaged').exists()


def test_another_kind_of_random_key_is_told(tmp_path):
    fill(tmp_path / 'c', [1])
    other = target({**STATE, 'key': jax.random.key(5, impl='rbg')})
    with (
        Checkpoints(tmp_path / 'c') as checkpoints,
        pytest.raises(UserError, match=r'key: uint32\[2\] in the checkpoint, uint32\[4\]'),
    ):
        checkpoints.restore_latest(other)


def test_a_checkpoint_that_another_process_took_away_gives_its_place_to_the_next(tmp_path):
    fill(tmp_path / 'c', [1, 2], keep=2)
    with Checkpoints(tmp_path / 'c', keep=2, read_only=True) as checkpoints:
        shutil.rmtree(tmp_path / 'c' / '2')
        assert checkpoints.restore_selected(target()).step == 1


def test_checkpoints_that_are_all_taken_away_are_told(tmp_path, monkeypatch):
    fill(tmp_path / 'c', [1])
    with Checkpoints(tmp_path / 'c', read_only=True) as checkpoints:
        shutil.rmtree(tmp_path / 'c' / '1')
        monkeypatch.setattr(checkpoints._manager, 'reload', lambda: None)
        with pytest.raises(UserError, match='Training is running'):
            checkpoints.restore_selected(target())


def test_a_checkpoint_that_may_not_be_read_is_not_moved(tmp_path, monkeypatch):
    fill(tmp_path / 'c', [1, 2], keep=2)
    with Checkpoints(tmp_path / 'c', keep=2) as checkpoints:

        def refuse(*args, **kwargs):
            raise ValueError('PERMISSION_DENIED: Error opening "zarr" driver')

        monkeypatch.setattr(checkpoints._manager, 'restore', refuse)
        with pytest.raises(UserError, match=r'may not be read.*Nothing was moved'):
            checkpoints.restore_latest(target())
    assert not (tmp_path / 'damaged').exists()


def test_what_cannot_be_read_back_is_told_at_once(tmp_path):
    with Checkpoints(tmp_path / 'c') as checkpoints:
        checkpoints.save(0, STATE, {})
        checkpoints.check_readable(0, target())
        for file in files_of(tmp_path / 'c' / '0' / 'state'):
            damage(file, 'zero')
        with pytest.raises(UserError, match=r'was saved to .* and cannot be read back'):
            checkpoints.check_readable(0, target())


def test_a_cut_file_makes_one_line_of_complaint(tmp_path):
    """The libraries' own complaints, of hundreds of lines, go to standard error as their coroutines are collected."""
    fill(tmp_path / 'c', [1, 2], keep=2)
    for file in files_of(tmp_path / 'c' / '2' / 'state'):
        damage(file, 'cut')
    program = (
        'import jax, jax.numpy as jnp, logging, sys\n'
        'from pathlib import Path\n'
        'from bqat_jax.experiment.checkpoints import Checkpoints\n'
        'from tests.experiment.test_checkpoints import target\n'
        'logging.basicConfig(level=logging.WARNING)\n'
        'with Checkpoints(Path(sys.argv[1]), keep=2) as checkpoints:\n'
        '    assert checkpoints.restore_latest(target()).step == 1\n'
    )
    process = subprocess.run(
        [sys.executable, '-c', program, str(tmp_path / 'c')], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ours = [line for line in process.stderr.splitlines() if 'bqat_jax' in line]
    assert len(ours) == 1 and 'is skipped: one of its files is missing, truncated or changed' in ours[0]
    assert len(process.stderr.splitlines()) <= 3, process.stderr
