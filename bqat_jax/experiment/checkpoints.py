"""Orbax checkpoints with checksums: a damaged checkpoint is detected, and the previous one is used."""

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
# Attempts to read: a process that trains may prune a checkpoint while another process reads it.
TRIES = 5
REMEDY = 'If it is the newest, --mode=train repeats its steps. Otherwise move it away, and another is selected.'


class Restored(NamedTuple):
    """An intact checkpoint.

    Attributes:
        step: its number.
        state: the tree of arrays.
        facts: the JSON saved with the arrays.
    """

    step: int
    state: Any
    facts: dict[str, Any]


class _Gone(Exception):
    """A checkpoint no longer exists."""


class _Damaged(Exception):
    """Files of a checkpoint are truncated, missing or changed; the message says which."""


class _Different(Exception):
    """The arrays of a checkpoint do not match the target; the message says which."""


class Checkpoints:
    """The checkpoints of one phase in a directory; the newest few and the one with the best score are kept.

    A save is asynchronous and atomic: unfinished checkpoints are ignored. Use as a context manager: leaving it waits
    for pending saves.
    """

    def __init__(self, directory: Place, *, keep: int = 1, has_scores: bool = False, read_only: bool = False):
        """Opens the directory.

        Args:
            directory: created if it does not exist.
            keep: number of the newest checkpoints to keep.
            has_scores: whether every save has a score; the checkpoint with the highest score is kept.
            read_only: whether only to read; another process may be writing.

        Raises:
            UserError: if the directory is a file, holds checkpoints that were copied without their commit files, or,
                with `read_only`, holds one with a damaged score.
        """
        self.directory = directory.absolute() if isinstance(directory, Path) else directory
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f'{self.directory} is a file, and checkpoints need a folder of that name. Move it away.')
        self._read_only = read_only
        _check_copied(self.directory)
        # Orbax reads every score when it opens a directory, and fails on an unreadable one.
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

        Only the first process finishes a save in a bucket; the managers of the others keep listing it as unfinished.
        A new manager sees it.
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
            if exception is None:  # otherwise the exception already raised says more
                raise self._save_failed(error) from error

    @property
    def latest_step(self) -> int | None:
        """The newest step, intact or not."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, facts: dict[str, Any], score: float | None = None) -> None:
        """Starts to save a checkpoint; `state` may be changed or donated as soon as this returns.

        Args:
            step: number of the checkpoint.
            state: tree of arrays.
            facts: JSON.
            score: higher is better, see `Metric.rank`; required if the directory was opened with `has_scores`.

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
        """Waits until every save is finished in all processes.

        Raises:
            UserError: if a checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error
        wait_for_all(f'saved {self.directory}')  # the first process writes the commit file of a bucket

    def restore_latest(self, target: Any) -> Restored | None:
        """Returns the newest intact checkpoint, from which training resumes; None if the directory is empty.

        A damaged one is skipped with a warning and, unless the directory was opened read-only, moved into the folder
        'damaged' beside the directory, which frees its number.

        Args:
            target: the tree to read, of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            UserError: if there are checkpoints but none is intact, or one cannot be accessed.
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
        if different is not None:  # no checkpoint matches the target
            raise self._not_fitting(different)
        if problems:
            listed = '\n  '.join(f'step {step}: {problem}' for step, problem in problems.items())
            raise UserError(
                f'No checkpoint in {self.directory} could be read:\n  {listed}\n'
                'If they are lost, use another --workdir, or move this directory away to start again.'
            )
        return None

    def restore_selected(self, target: Any, remedy: str = REMEDY) -> Restored | None:
        """Returns the selected checkpoint: that with the highest score, or the newest without scores; None if empty.

        If it is damaged, no other checkpoint replaces it.

        Args:
            target: the tree to read, of `jax.ShapeDtypeStruct`s with shardings.
            remedy: remedy in the error message for a damaged checkpoint.

        Raises:
            UserError: if it is damaged, does not match `target` or cannot be accessed.
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
                    f'The selected checkpoint, step {step} in {self.directory}, is damaged: {problem}. {remedy}'
                ) from problem
        raise UserError(
            f'Training is running in {self.directory}: its checkpoints are replaced before they can be read. '
            'Wait until it ends, or keep more checkpoints (checkpoint.keep).'
        )

    def check_readable(self, step: int, target: Any) -> None:
        """Checks that a checkpoint can be read back as it was saved.

        Raises:
            UserError: if it cannot; a run must not continue without usable checkpoints.
        """
        self.wait()
        try:
            self._read(step, target)
        except (_Damaged, _Gone, _Different) as problem:
            raise UserError(
                f'The checkpoint of step {step} was saved to {self.directory} and cannot be read back: {problem}. '
                'Use a --workdir on another file system.'
            ) from problem

    def _read(self, step: int, target: Any) -> Restored:
        """Reads a checkpoint.

        Raises:
            _Gone: if another process removed it.
            _Damaged: if its files are truncated, missing or changed.
            _Different: if it does not match `target`.
            UserError: if it cannot be accessed.
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
            gc.collect()  # within `quiet`: unfinished reads warn when they are collected
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
            raise _Damaged('its facts differ from what was written: their checksum does not match')
        described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(target)]
        if described != [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(read['state'])]:
            raise _Damaged('its metadata of shapes and dtypes is missing or changed')
        if not np.array_equal(digest(read['state']), read['digest']):
            raise _Damaged('its arrays differ from what was written: their checksum does not match')
        return Restored(step, read['state'], json.loads(sealed['text']))

    def _check_arrays(self, manager: ocp.CheckpointManager, step: int, target: Any) -> None:
        """Raises _Different if the arrays of a checkpoint do not match the target."""
        metadata: Any = manager.item_metadata(step)
        if metadata['state'] is None:
            raise _Damaged('its metadata of arrays is missing or changed')
        stored = arrays_of(metadata['state'].tree['state'])
        wanted = arrays_of(target)
        differences = [f'{path}: not in the checkpoint' for path in wanted if path not in stored]
        differences += [f'{path}: not in the config' for path in stored if path not in wanted]
        differences += [
            f'{path}: {stored[path]} in the checkpoint, {wanted[path]} in the config'
            for path in wanted
            if stored.get(path, wanted[path]) != wanted[path]
        ]
        if differences:
            listed = '; '.join(differences[:3])
            raise _Different(f'the arrays of step {step} do not match ({len(differences)} differ: {listed})')

    def _check_objects(self, step: int) -> None:
        """Checks that the objects of a checkpoint in a bucket can be read, whatever their content.

        TensorStore reports denied access and a truncated file with one status, and handles many failing reads badly.

        Raises:
            UserError: if an object cannot be read.
        """
        if not is_local(self.directory):
            try:
                check_objects(self.directory / str(step))
            except FileNotFoundError:  # the read that follows reports what is missing
                pass
            except Exception as error:
                raise self._not_readable(step, error) from error

    def _diagnose(self, step: int, error: Exception) -> Exception:
        """The exception to raise for an error of Orbax or TensorStore."""
        directory, text = self.directory / str(step), f'{type(error).__name__}: {error!s}'
        try:
            is_gone = not directory.is_dir()
        except Exception as other:  # the bucket does not respond or denies access
            return self._not_readable(step, other)
        if is_gone:
            return _Gone('it is gone: another process removed it')
        if 'RESOURCE_EXHAUSTED' in text:
            return error
        if not is_damage(error):
            return self._not_readable(step, error)
        try:
            self._check_objects(step)
        except UserError as other:
            return other
        first = text.partition('\n')[0][:200]
        return _Damaged(f'one of its files is missing, truncated or changed ({first})')

    def _not_readable(self, step: int, error: Exception) -> UserError:
        where = 'its disk does not respond' if is_local(self.directory) else 'its bucket does not respond'
        why = f'{type(error).__name__}: {str(error)[:300]}'
        if not is_local(self.directory) and not isinstance(error, UserError):
            why = explain(error, self.directory)
        kind = UserError if is_local(self.directory) else BucketError
        return kind(
            f'The checkpoint of step {step} in {self.directory} may not be read, or {where}: {why} Nothing was moved. '
            'Fix the cause and run the same command again.'
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
            'another plugin or other settings of JAX made them. Use those, or another --workdir.'
        )

    def _save_failed(self, error: Exception) -> UserError:
        if not is_local(self.directory):
            why = explain(error, self.directory)
            return BucketError(f'A checkpoint could not be written to {self.directory}: {why}')
        return UserError(
            f'A checkpoint could not be written to {self.directory}: {type(error).__name__}: {str(error)[:500]}\n'
            'Is the disk full or read-only? Run the same command again to resume from the last finished checkpoint.'
        )


def _steps_in(directory: Place) -> list[Place]:
    return sorted(path for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def _check_copied(directory: Place) -> None:
    """Raises UserError if checkpoints in a bucket were copied without their commit files.

    Orbax would treat them as interrupted saves and remove them. Saves happen one at a time: an interrupted save is the
    single checkpoint after the last committed one, or step 0. An uncommitted one before it was being removed.
    """
    if is_local(directory):
        return
    steps = _steps_in(directory)
    numbers = {int(step.name) for step in steps}
    counting = {int(step.name) for step in steps if (step / COMMIT_FILE).exists()}
    behind = sorted(number for number in numbers - counting if number > max(counting, default=-1))
    if len(behind) > 1 or (behind and not counting and behind != [0]):
        raise UserError(
            f'{directory} has the checkpoints {", ".join(map(str, behind))} without the file {COMMIT_FILE}, which '
            'marks a checkpoint in a bucket as complete: they were copied without it. Copy them again with all files; '
            f'or, if they are complete, put an empty file {COMMIT_FILE} into each and into its folders; or use another '
            '--workdir.'
        )
    for number in sorted(numbers - counting):
        logger.info('The checkpoint of step %d in %s is unfinished and is ignored.', number, directory)


def _options_for(directory: Place) -> dict[str, Any]:
    """Orbax options for a folder in a bucket; none for a local one."""
    if is_local(directory):
        return {}
    from bqat_jax.storage.orbax_stores import check_version, options_for

    check_version(directory)
    return options_for(directory)


def _has_readable_score(checkpoint: Place) -> bool:
    if not is_local(checkpoint) and not (checkpoint / COMMIT_FILE).exists():
        return True  # unfinished checkpoints are not read
    path = checkpoint / 'metrics' / 'metrics'
    try:
        return not path.exists() or isinstance(json.loads(path.read_bytes())['score'], float)
    except (ValueError, KeyError, TypeError):
        return False


def _move_aside(checkpoint: Place) -> Place:
    """Moves a checkpoint into 'damaged' and returns its new path; the first process moves it, and all wait."""
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
