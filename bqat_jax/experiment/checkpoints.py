"""Checkpoints: Orbax's, with a checksum of their own, so that a damaged one is noticed and the one before is used."""

import contextlib
import gc
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from bqat_jax.distributed.processes import is_first, wait_for_all
from bqat_jax.errors import UserError
from bqat_jax.experiment.integrity import arrays_of, digest, is_damage, on_every_device, quiet
from bqat_jax.storage import (
    COMMIT_FILE,
    BucketError,
    Place,
    check_objects,
    explain,
    is_local,
    move_folder,
)

logger = logging.getLogger(__name__)

DAMAGED = 'damaged'
# Another process that trains may prune a checkpoint while it is read; so often another is tried.
TRIES = 5
REMEDY = (
    'If it is the newest, --mode=train makes its steps again; else move it away from there, and another is selected.'
)


class Restored(NamedTuple):
    """A checkpoint that was read and found intact.

    Attributes:
        step: its step.
        state: the tree of arrays.
        facts: the JSON beside them.
    """

    step: int
    state: Any
    facts: dict[str, Any]


class _Gone(Exception):
    """A checkpoint that is no longer there."""


class _Damaged(Exception):
    """A checkpoint whose files are cut, missing or changed; the message says how."""


class _Different(Exception):
    """A checkpoint with other arrays than were asked for; the message says which."""


class Checkpoints:
    """The checkpoints of one phase, in a directory; the newest few are kept, and the one with the best score.

    A save is asynchronous and atomic: a checkpoint that was not finished does not count. Use as a context manager: on
    the way out pending saves are finished.
    """

    def __init__(self, directory: Place, *, keep: int = 1, has_scores: bool = False, read_only: bool = False):
        """Opens the directory.

        Args:
            directory: made if it is not there.
            keep: how many of the newest to keep.
            has_scores: whether every save gives a score; the checkpoint with the highest is kept.
            read_only: to look at what another process may be writing.

        Raises:
            UserError: if the directory is a file, or holds checkpoints that were copied without the files that make
                them count; or a score is damaged and, the directory being read-only, cannot be moved aside.
        """
        self.directory = directory.absolute() if isinstance(directory, Path) else directory
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f'{self.directory} is a file, and checkpoints go into a folder of that name. Move it away.')
        self._read_only = read_only
        _check_copied(self.directory)
        # Orbax reads every score as it opens a directory, and gives up on one that it cannot read.
        for path in [path for path in _steps_in(self.directory) if not _has_readable_score(path)]:
            if read_only:
                raise UserError(f'{path} is damaged: its score is not readable. --mode=train moves it aside.')
            logger.warning('The checkpoint %s has no readable score. It is moved to %s.', path, _move_aside(path))
        self._has_scores = has_scores
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if has_scores:
            policies.append(preservation_policy.BestN(get_metric_fn=_score, n=1))
        self._policy = preservation_policy.AnyPreservationPolicy(policies)
        with quiet():
            try:
                self._manager = self._make_manager(read_only)
            except Exception as error:
                if is_local(self.directory):
                    raise
                raise BucketError(
                    f'The checkpoints in {self.directory} cannot be listed: {explain(error, self.directory)}'
                ) from error

    def _make_manager(self, read_only: bool) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            best_fn=_score if self._has_scores else None,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            **_options_for(self.directory),
        )
        handlers: Any = {'state': ocp.StandardCheckpointHandler(), 'facts': ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[ocp.CheckpointManager]:
        """The manager to read with.

        Of several processes the first one alone finishes a save in a bucket, and the managers of the others go on
        taking it for unfinished; a new one sees what is there.
        """
        if is_local(self.directory) or jax.process_count() == 1:
            yield self._manager
            return
        with self._make_manager(read_only=True) as manager:
            yield manager

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind, exception, traceback) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if exception is None:  # else that one goes on, and it says more
                raise self._save_failed(error) from error

    @property
    def latest_step(self) -> int | None:
        """The newest step there is, intact or not."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, facts: dict[str, Any], score: float | None = None) -> None:
        """Begins to save; what it saves may be changed or donated as soon as it returns.

        Args:
            step: number of the checkpoint.
            state: tree of arrays.
            facts: JSON.
            score: higher is better, see `Metric.rank`; needed if the directory was opened with `has_scores`.

        Raises:
            UserError: if this or an earlier save could not be written.
        """
        text = json.dumps(facts, sort_keys=True)
        content = ocp.args.Composite(
            state=ocp.args.StandardSave({'state': state, 'digest': digest(state)}),
            facts=ocp.args.JsonSave({'text': text, 'crc32': zlib.crc32(text.encode())}),
        )
        try:
            self._manager.save(step, args=content, metrics={'score': score} if self._has_scores else None, force=True)
        except Exception as error:
            raise self._save_failed(error) from error

    def wait(self) -> None:
        """Waits until every save is finished, in all of several processes.

        Raises:
            UserError: if one could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error
        wait_for_all(f'saved {self.directory}')  # the first one writes what makes a checkpoint in a bucket count

    def restore_latest(self, target: Any) -> Restored | None:
        """Returns the newest intact checkpoint, or None if the directory has none at all; to go on training from.

        A damaged one is skipped with a warning and, unless the directory was opened read-only, moved aside into
        'damaged' beside it, so that its number is free again.

        Args:
            target: the tree to read, of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            UserError: if there are checkpoints but none is intact, or one may not be read.
        """
        problems: dict[int, str] = {}
        different: _Different | None = None
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, target)
            except (_Damaged, _Gone, _Different) as problem:
                problems[step] = str(problem)
                different = problem if isinstance(problem, _Different) else different
                continue
            for damaged, problem in problems.items():
                self._set_aside(damaged, problem)
            return restored
        if different is not None:  # and none has the arrays that were asked for
            raise self._not_fitting(different)
        if problems:
            listed = '\n  '.join(f'step {step}: {problem}' for step, problem in problems.items())
            raise UserError(
                f'No checkpoint in {self.directory} could be read:\n  {listed}\n'
                'If they are lost, take another --workdir, or move this directory away to start again.'
            )
        return None

    def restore_selected(self, target: Any, remedy: str = REMEDY) -> Restored | None:
        """Returns the checkpoint with the highest score, or the newest where there are no scores; None without any.

        It is that one and no other.

        Args:
            target: the tree to read, of `jax.ShapeDtypeStruct`s with shardings.
            remedy: what can be done if it is damaged, for the message.

        Raises:
            UserError: if it is damaged, has other arrays or may not be read.
        """
        for _ in range(TRIES):
            step = self._manager.best_step() if self._has_scores else self._manager.latest_step()
            if step is None:
                return None
            try:
                return self._read(step, target)
            except _Gone:
                self._manager.reload()
            except _Different as problem:
                raise self._not_fitting(problem) from problem
            except _Damaged as problem:
                raise UserError(
                    f'The checkpoint of step {step} in {self.directory}, which is selected, is damaged: {problem}. '
                    f'{remedy}'
                ) from problem
        raise UserError(
            f'Training is under way in {self.directory}: its checkpoints are replaced before they can be read. '
            'Wait for its end, or keep more of them (checkpoint.keep).'
        )

    def check_readable(self, step: int, target: Any) -> None:
        """Checks that a checkpoint can be read back as it was saved.

        Raises:
            UserError: if it cannot, so that no run goes on whose checkpoints are lost.
        """
        self.wait()
        try:
            self._read(step, target)
        except (_Damaged, _Gone, _Different) as problem:
            raise UserError(
                f'The checkpoint of step {step} was saved to {self.directory}, and cannot be read back: {problem}. '
                'Take a --workdir on another file system.'
            ) from problem

    def _read(self, step: int, target: Any) -> Restored:
        """A checkpoint.

        Raises:
            _Gone: if another process took it away.
            _Damaged: if its files are cut, missing or changed.
            _Different: if it has other arrays.
            UserError: if it may not be read.
        """
        problem: Exception
        self._check_objects(step)
        with quiet():
            try:
                with self._reader() as manager:
                    return self._read_intact(manager, step, target)
            except (_Damaged, _Different, MemoryError):
                raise
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                problem = self._diagnose(step, error)
            gc.collect()  # what is left of the reading complains when it is collected
        raise problem

    def _read_intact(self, manager: ocp.CheckpointManager, step: int, target: Any) -> Restored:
        self._check_arrays(manager, step, target)
        sharding = on_every_device(jax.tree.leaves(target)[0].sharding)
        count = len(jax.tree.leaves(target))
        sealed_target = {
            'state': target,
            'digest': jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=sharding),
        }
        content = ocp.args.Composite(state=ocp.args.StandardRestore(sealed_target), facts=ocp.args.JsonRestore())
        items: Any = manager.restore(step, args=content)
        read, sealed = items.state, items.facts
        if zlib.crc32(sealed['text'].encode()) != sealed['crc32']:
            raise _Damaged('its facts are not what was written: their checksum does not match')
        described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(target)]
        if described != [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(read['state'])]:
            raise _Damaged('what its files say of shapes and dtypes is missing or changed')
        if not np.array_equal(digest(read['state']), read['digest']):
            raise _Damaged('its arrays are not what was written: their checksum does not match')
        return Restored(step, read['state'], json.loads(sealed['text']))

    def _check_arrays(self, manager: ocp.CheckpointManager, step: int, target: Any) -> None:
        """Raises _Different if a checkpoint has other arrays than the target."""
        metadata: Any = manager.item_metadata(step)
        if metadata['state'] is None:
            raise _Damaged('what its files say of its arrays is missing or changed')
        stored = arrays_of(metadata['state'].tree['state'])
        wanted = arrays_of(target)
        differences = [f'{path}: it has none' for path in wanted if path not in stored]
        differences += [f'{path}: the config has none' for path in stored if path not in wanted]
        differences += [
            f'{path}: {stored[path]} there, {wanted[path]} by the config'
            for path in wanted
            if stored.get(path, wanted[path]) != wanted[path]
        ]
        if differences:
            listed = '; '.join(differences[:3])
            raise _Different(f'step {step} has other arrays ({len(differences)} differ: {listed})')

    def _check_objects(self, step: int) -> None:
        """Checks that the objects of a checkpoint in a bucket can be read, whatever is in them.

        TensorStore calls a refusal and a cut file by the same names, and many readings that fail at once end badly.

        Raises:
            UserError: if one cannot.
        """
        if not is_local(self.directory):
            try:
                check_objects(self.directory / str(step))
            except FileNotFoundError:  # it is gone, or one of them is: the reading tells
                pass
            except Exception as error:
                raise self._not_readable(step, error) from error

    def _diagnose(self, step: int, error: Exception) -> Exception:
        """What to raise for an error of Orbax or TensorStore."""
        directory, text = self.directory / str(step), f'{type(error).__name__}: {error!s}'
        try:
            is_gone = not directory.is_dir()
        except Exception as other:  # a bucket that does not answer, or refuses
            return self._not_readable(step, other)
        if is_gone:
            return _Gone('it is gone: another process took it away')
        if 'RESOURCE_EXHAUSTED' in text:
            return error
        if not is_damage(error):
            return self._not_readable(step, error)
        try:
            self._check_objects(step)
        except UserError as other:
            return other
        first = text.partition('\n')[0][:200]
        return _Damaged(f'a file of it is missing, cut or changed ({first})')

    def _not_readable(self, step: int, error: Exception) -> UserError:
        where = 'its disk does not answer' if is_local(self.directory) else 'its bucket does not answer'
        why = f'{type(error).__name__}: {str(error)[:300]}'
        if not is_local(self.directory) and not isinstance(error, UserError):
            why = explain(error, self.directory)
        kind = UserError if is_local(self.directory) else BucketError
        return kind(
            f'The checkpoint of step {step} in {self.directory} may not be read, or {where}: {why} Nothing was moved: '
            'mend that, and run the same command again.'
        )

    def _set_aside(self, step: int, problem: str) -> None:
        path, place = self.directory / str(step), 'left where it is'
        if not self._read_only and path.is_dir():
            place = f'moved to {_move_aside(path)}'
            self._manager.reload()
        logger.warning(
            'The checkpoint of step %d in %s is skipped: %s. It is %s.', step, self.directory, problem, place
        )

    def _not_fitting(self, problem: _Different) -> UserError:
        return UserError(
            f'The checkpoints in {self.directory} do not fit this config: {problem}. Another version of bqat_jax, '
            'another plugin or other settings of JAX made them: go on with these, or take another --workdir.'
        )

    def _save_failed(self, error: Exception) -> UserError:
        if not is_local(self.directory):
            why = explain(error, self.directory)
            return BucketError(f'A checkpoint could not be written to {self.directory}: {why}')
        return UserError(
            f'A checkpoint could not be written to {self.directory}: {type(error).__name__}: {str(error)[:500]}\n'
            'Is the disk full, or not writable? Run the same command again to go on from the last finished checkpoint.'
        )


def _steps_in(directory: Place) -> list[Place]:
    return sorted(path for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def _check_copied(directory: Place) -> None:
    """Refuses a folder in a bucket whose checkpoints lack the file that makes them count.

    Orbax would take them for saves that were broken off, and remove them. A run makes one save after another: what was
    broken off is one checkpoint behind the last that counts, or the first of all, of step 0. One before the last that
    counts was being removed.
    """
    if is_local(directory):
        return
    steps = _steps_in(directory)
    numbers = {int(step.name) for step in steps}
    counting = {int(step.name) for step in steps if (step / COMMIT_FILE).exists()}
    behind = sorted(number for number in numbers - counting if number > max(counting, default=-1))
    if len(behind) > 1 or (behind and not counting and behind != [0]):
        raise UserError(
            f'{directory} has the checkpoints {", ".join(map(str, behind))} without the file {COMMIT_FILE}. Without it '
            'a checkpoint in a bucket does not count: they were copied without it. Copy them again with all files; or, '
            f'if they are whole, put an empty file {COMMIT_FILE} into each and into the folders in it; or take another '
            '--workdir.'
        )
    for number in sorted(numbers - counting):
        logger.info('The checkpoint of step %d in %s was not finished; it does not count.', number, directory)


def _options_for(directory: Place) -> dict[str, Any]:
    """Options of Orbax's for a folder in a bucket."""
    if is_local(directory):
        return {}
    from bqat_jax.storage.orbax_stores import check_version, options_for

    check_version(directory)
    return options_for(directory)


def _has_readable_score(checkpoint: Place) -> bool:
    if not is_local(checkpoint) and not (checkpoint / COMMIT_FILE).exists():
        return True  # it does not count, and is not read
    path = checkpoint / 'metrics' / 'metrics'
    try:
        return not path.exists() or isinstance(json.loads(path.read_bytes())['score'], float)
    except (ValueError, KeyError, TypeError):
        return False


def _move_aside(checkpoint: Place) -> Place:
    """Moves a checkpoint out of the way and returns where; of several processes the first one does it, and all wait."""
    wait_for_all(f'seen {checkpoint}')
    place = checkpoint.parent.parent / DAMAGED
    number = 0
    while (target := place / f'{checkpoint.name}-{number}').exists():
        number += 1
    wait_for_all(f'named {checkpoint}')
    if is_first():
        move_folder(checkpoint, target)
    wait_for_all(f'moved {checkpoint}')
    return target


def _score(metrics: dict[str, float]) -> float:
    return metrics['score']
