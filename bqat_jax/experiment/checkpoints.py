"""Checkpoints: Orbax's, with a checksum of their own, so that a damaged one is noticed and the one before is used."""

import functools
import json
import logging
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import preservation_policy

from bqat_jax.distributed.processes import is_first, wait_for_all
from bqat_jax.errors import UserError

logger = logging.getLogger(__name__)

DAMAGED = 'damaged'


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


def digest(tree: Any) -> jax.Array:
    """Returns a checksum of every array of a tree, uint32 (arrays,), on every device; any changed bit changes it.

    Orbax notices missing and cut files, but not a flipped bit inside an array. The bits of element j, counted from 0,
    enter a sum modulo 2^32 with the odd factor 2j + 1.
    """
    return _digest(tree, _on_every_device(jax.tree.leaves(tree)[0].sharding))


def _on_every_device(sharding: Any) -> Any:
    """The sharding of an array of which every device of another sharding has the whole."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


@functools.partial(jax.jit, static_argnums=1)
def _digest(tree: Any, sharding: Any) -> jax.Array:
    def checksum(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        unsigned = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
        factors = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(1)
        return jnp.sum(bits * factors, dtype=jnp.uint32)

    checksums = jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)])
    return jax.lax.with_sharding_constraint(checksums, sharding)


class Checkpoints:
    """The checkpoints of one phase, in a directory; the newest few are kept, and the one with the best score.

    A save is asynchronous and atomic: a checkpoint that was not finished does not count. Use as a context manager: on
    the way out pending saves are finished.
    """

    def __init__(self, directory: Path, *, keep: int = 1, has_scores: bool = False, read_only: bool = False):
        """Opens the directory.

        Args:
            directory: made if it is not there.
            keep: how many of the newest to keep.
            has_scores: whether every save gives a score; the checkpoint with the highest is kept.
            read_only: to look at what another process may be writing.

        Raises:
            UserError: if a score is damaged and, the directory being read-only, cannot be moved aside.
        """
        self.directory = directory.absolute()
        self._read_only = read_only
        # Orbax reads every score as it opens a directory, and gives up on one that it cannot read.
        for path in [path for path in _steps_in(self.directory) if not _has_readable_score(path)]:
            if read_only:
                raise UserError(f'{path} is damaged: its score is not readable. --mode=train moves it aside.')
            _move_aside(path)
        self._has_scores = has_scores
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if has_scores:
            policies.append(preservation_policy.BestN(get_metric_fn=_score, n=1))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                best_fn=_score if has_scores else None,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

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
            score: the higher the better; needed if the directory was opened with `has_scores`.

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
        """Waits until every save is finished.

        Raises:
            UserError: if one could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(error) from error

    def restore_latest(self, target: Any) -> Restored | None:
        """Returns the newest intact checkpoint, or None if the directory has none at all.

        A damaged one is skipped with a warning and, unless the directory was opened read-only, moved aside into
        'damaged' beside it, so that its number is free again.

        Args:
            target: the tree to read, of `jax.ShapeDtypeStruct`s with shardings.

        Raises:
            UserError: if there are checkpoints, but none is intact.
        """
        return self._restore(sorted(self._manager.all_steps(), reverse=True), target)

    def restore_best(self, target: Any) -> Restored | None:
        """Returns the intact checkpoint with the highest score, else as `restore_latest`."""
        best = self._manager.best_step() if self._has_scores else None
        steps = sorted(self._manager.all_steps(), reverse=True)
        if best is not None:
            steps = [best] + [step for step in steps if step != best]
        return self._restore(steps, target)

    def _restore(self, steps: list[int], target: Any) -> Restored | None:
        problems: dict[int, str] = {}
        for step in steps:
            try:
                restored = self._read(step, target)
            except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
                problems[step] = f'{type(error).__name__}: {str(error)[:300]}'
                logger.warning(
                    'The checkpoint of step %d in %s is damaged and skipped; Orbax may print complaints of its own.',
                    step,
                    self.directory,
                )
                continue
            for damaged in problems:
                self._set_aside(damaged)
            return restored
        if problems:
            listed = '\n  '.join(f'step {step}: {spec}' for step, spec in problems.items())
            raise UserError(
                f'No checkpoint in {self.directory} could be read:\n  {listed}\n'
                'If they are lost, take another --workdir, or move this directory away to start again.'
            )
        return None

    def _read(self, step: int, target: Any) -> Restored:
        sharding = _on_every_device(jax.tree.leaves(target)[0].sharding)
        count = len(jax.tree.leaves(target))
        sealed_target = {
            'state': target,
            'digest': jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=sharding),
        }
        content = ocp.args.Composite(state=ocp.args.StandardRestore(sealed_target), facts=ocp.args.JsonRestore())
        items: Any = self._manager.restore(step, args=content)
        read, sealed = items.state, items.facts
        if zlib.crc32(sealed['text'].encode()) != sealed['crc32']:
            raise ValueError('the checksum of the facts does not match')
        described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(target)]
        if described != [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(read['state'])]:
            raise ValueError('the shapes or dtypes of the arrays are not those that were asked for')
        if not np.array_equal(digest(read['state']), read['digest']):
            raise ValueError('the checksum of the arrays does not match')
        return Restored(step, read['state'], json.loads(sealed['text']))

    def _set_aside(self, step: int) -> None:
        if not self._read_only:
            _move_aside(self.directory / str(step))
            self._manager.reload()

    def _save_failed(self, error: Exception) -> UserError:
        return UserError(
            f'A checkpoint could not be written to {self.directory}: {type(error).__name__}: {str(error)[:500]}\n'
            'Is the disk full, or not writable? Run the same command again to go on from the last finished checkpoint.'
        )


def _steps_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def _has_readable_score(checkpoint: Path) -> bool:
    path = checkpoint / 'metrics' / 'metrics'
    try:
        return not path.exists() or isinstance(json.loads(path.read_bytes())['score'], float)
    except (ValueError, KeyError, TypeError):
        return False


def _move_aside(checkpoint: Path) -> None:
    """Moves a checkpoint out of the way; of several processes the first one does it, and all wait."""
    wait_for_all(f'seen {checkpoint}')
    if not is_first():
        wait_for_all(f'moved {checkpoint}')
        return
    place = checkpoint.parent.parent / DAMAGED
    place.mkdir(exist_ok=True)
    number = 0
    while (target := place / f'{checkpoint.name}-{number}').exists():
        number += 1
    checkpoint.rename(target)
    wait_for_all(f'moved {checkpoint}')
    logger.warning('The checkpoint of step %s is damaged; it was moved to %s.', checkpoint.name, target)


def _score(metrics: dict[str, float]) -> float:
    return metrics['score']
