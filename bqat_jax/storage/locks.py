"""Exclusive access to a run's folder: a lock on a local file system, a lease in a bucket."""

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
# Errors of file systems without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextlib.contextmanager
def held(directory: Place, lease_seconds: float) -> Iterator[Hold]:
    """Holds a directory for one training process.

    A local directory is locked until the process ends; without locks in its file system, only a warning is logged. A
    bucket has a lease.

    Args:
        directory: an existing directory.
        lease_seconds: seconds after which another process may acquire a lease that is not renewed.

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
            # A process that was suspended during a save may fail in any way; the lost lease is the cause.
            if not isinstance(error, Unavailable | Lost) and _is_lost(lease):
                raise Lost() from error
            if not is_told:
                raise BucketError(f'A request to {directory} failed: {explain(error, directory)}') from error
            raise


def _is_lost(lease: Lease) -> bool:
    """Whether another process has certainly acquired the lease."""
    try:
        return not lease.is_held()
    except Exception:  # the bucket itself ended the run
        return False


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / LOCK).open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(
                f'{directory} is in use by another training process. Wait for it, or use another --workdir.'
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                'The file system of %s has no locks (%s). Make sure that no other process trains there.',
                directory,
                error.strerror,
            )
        yield


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Waits for a lock file and holds it, at most until the process ends.

    Without locks in the file system it does not wait.

    Args:
        path: the lock file, which is created if needed and stays.

    Raises:
        OSError: if the file cannot be created.
    """
    with path.open('a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
