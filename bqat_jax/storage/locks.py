"""Who may write into a run's folder: a lock where the file system has them, a lease in a bucket."""

import contextlib
import errno
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from bqat_jax.errors import UserError
from bqat_jax.storage.checking import explain, is_of_bucket
from bqat_jax.storage.leases import Hold, InUse, Lease, Lost
from bqat_jax.storage.patience import BucketError, Unavailable
from bqat_jax.storage.places import Place

logger = logging.getLogger(__name__)

LOCK = '.lock'
# What a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def held(directory: Place, lease_seconds: float) -> Iterator[Hold]:
    """Holds a directory for one training process, however that ends.

    Locally it is a lock, which goes with the process; on a file system without locks it warns, and holds nothing. In a
    bucket it is a lease.

    Args:
        directory: it is there.
        lease_seconds: after which a lease that was not renewed is taken over.

    Raises:
        UserError: if another process holds it, and for errors of the bucket within the context.
    """
    if isinstance(directory, Path):
        with _locked(directory):
            yield Hold()
        return
    with Lease(directory, lease_seconds) as lease:
        try:
            yield Hold(lease, is_in_bucket=True)
        except Exception as error:
            is_told = isinstance(error, UserError)
            if not is_told and not is_of_bucket(error):
                raise
            # Whatever a process says that was suspended in the middle of a save: this is why.
            if not isinstance(error, Unavailable | Lost) and _is_lost(lease):
                raise Lost() from error
            if not is_told:
                raise BucketError(f'A request to {directory} failed: {explain(error, directory)}') from error
            raise


def _is_lost(lease: Lease) -> bool:
    """Whether another process has surely taken over."""
    try:
        return not lease.is_held()
    except Exception:  # a bucket that refuses or does not answer is what ended the run
        return False


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / LOCK).open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(
                f'{directory} is in use by another training process. Wait for it, or take another --workdir.'
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                'The file system of %s has no locks (%s): make sure that no other process trains there.',
                directory,
                error.strerror,
            )
        yield


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Waits for a lock file and holds it; the lock goes with the process, however it ends.

    Where the file system has no locks, nothing is waited for.

    Args:
        path: of the lock file, which is made if it is not there, and stays.

    Raises:
        OSError: if the file cannot be made.
    """
    with path.open('a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
