"""Checks that a bucket can be used before anything is computed, and explains its errors."""

import contextlib
import re
import traceback
import uuid
from collections.abc import Iterator

from bqat_jax.errors import UserError
from bqat_jax.storage.moving import files_below
from bqat_jax.storage.patience import BucketError, Unavailable
from bqat_jax.storage.places import Place, bucket_of, filesystem_of, is_local, scheme_of

PROBE = '.probe-'
MOST_TRIED = 8
LIBRARIES = ('gcsfs', 's3fs', 'botocore', 'aiobotocore', 'aiohttp', 'google')
# Regular expressions for the texts of the libraries' errors, by cause.
NO_CREDENTIALS = (
    'Unable to locate credentials',
    'NoCredentialsError',
    'Anonymous caller',
    'DefaultCredentialsError',
    'default credentials were not found',
    'PartialCredentialsError',
    'The config profile',
)
EXPIRED = ('ExpiredToken', 'token has expired', 'Token has expired', 'invalid_grant', 'InvalidToken')
REFUSED = (
    *(r'occurred \(40[13]\)', r', 40[13]$', r'HTTP (response code: )?40[13]', 'Forbidden', 'Access ?Denied'),
    *('Unauthorized', 'Unauthenticated', 'UNAUTHENTICATED', 'PERMISSION_DENIED', 'PermissionError'),
    *('Permission denied', r'does not have storage\.', 'InvalidAccessKeyId', 'SignatureDoesNotMatch'),
    *('AllAccessDisabled', 'AccountProblem'),
)
REGION = ('PermanentRedirect', 'AuthorizationHeaderMalformed', 'IllegalLocationConstraint', 'is wrong; expecting')
MISSING = ('NoSuchBucket', 'bucket does not exist', 'FileNotFoundError')
CREDENTIALS = {
    'gs': 'On a Cloud TPU or a VM give it a service account; elsewhere run: gcloud auth application-default login.',
    's3': 'Give the machine a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.',
}
RIGHTS = {
    'gs': 'storage.buckets.get, and storage.objects.list, .get, .create and .delete (roles/storage.objectUser and '
    'roles/storage.legacyBucketReader)',
    's3': 's3:ListBucket on the bucket, and s3:GetObject, s3:PutObject and s3:DeleteObject on its objects',
}


def check_reachable(directory: Place, name: str) -> None:
    """Checks that a folder in a bucket can be listed, and that a file in it can be written, read and deleted.

    Local folders are not checked.

    Args:
        directory: the folder; it need not exist, but its bucket must.
        name: flag or key that set it, for messages.

    Raises:
        UserError: naming the operation that fails, and the remedy.
    """
    if is_local(directory):
        return
    system, probe = filesystem_of(directory), f'{directory}/{PROBE}{uuid.uuid4().hex}'
    content = b'Whether this folder can be written. It may be deleted.'
    check_listed(directory, name)
    with explained(f'{name}={str(directory)!r}: no file can be written there', directory):
        system.pipe_file(probe, content)
        _check_exclusive(system, probe, f'{name}={str(directory)!r}')
    with explained(f'{name}={str(directory)!r}: a file that was written there cannot be read', directory):
        content_read = system.cat_file(probe)
    if content_read != content:
        raise UserError(
            f'{name}={str(directory)!r}: a file that was written there is read with other content. Is there a cache '
            'or a proxy in between?'
        )
    with explained(f'{name}={str(directory)!r}: a file that was written there cannot be deleted', directory):
        system.rm_file(probe)


def check_listed(directory: Place, name: str) -> None:
    """Checks that a folder in a bucket, which is only read, can be listed.

    Raises:
        UserError: naming the cause and the remedy.
    """
    if not is_local(directory):
        bucket = f'{scheme_of(directory)}://{bucket_of(directory)}'
        with explained(f'{name}={str(directory)!r}: its bucket {bucket} cannot be listed', directory):
            _list(filesystem_of(directory), bucket, str(directory))


def check_objects(directory: Place) -> None:
    """Reads the first byte of the largest and the smallest objects below a folder in a bucket.

    Raises:
        Exception: any error of the libraries, if an object may not be read or the bucket does not respond.
    """
    sizes = {name: int(facts['size'] or 0) for name, facts in files_below(directory).items()}
    names = sorted((name for name in sizes if sizes[name]), key=lambda name: sizes[name])
    system = filesystem_of(directory)
    for name in {*names[:MOST_TRIED], *names[-MOST_TRIED:]}:
        system.cat_file(f'{directory}/{name}', 0, 1)


def _check_exclusive(system, probe: str, given: str) -> None:
    """Checks that an existing file cannot be created again, on which exclusive access relies."""
    try:
        system.pipe_file(probe, b'', mode='create')
    except Unavailable:
        raise
    except Exception:  # the file systems raise different errors
        return
    raise UserError(
        f'{given}: the store overwrites an existing file although If-None-Match forbids it, so that two runs could '
        'write into one folder. Use another store.'
    )


def _list(system, bucket: str, directory: str) -> None:
    """Lists a folder; a missing folder in an existing bucket is empty."""
    try:
        system.ls(directory, detail=False)
    except FileNotFoundError as error:
        if not system.exists(bucket):
            raise FileNotFoundError(f'The specified bucket does not exist: {bucket}') from error


@contextlib.contextmanager
def explained(what: str, path: Place) -> Iterator[None]:
    """Turns errors of a bucket within the context into UserErrors with cause and remedy.

    Args:
        what: the beginning of the message, which says what failed.
        path: a path in the bucket.
    """
    try:
        yield
    except UserError as error:
        kind = BucketError if isinstance(error, BucketError) else UserError
        raise kind(f'{what}: {error}') from error
    except Exception as error:  # every library has its own errors
        raise BucketError(f'{what}: {explain(error, path)}') from error


def explain(error: BaseException, path: Place | str) -> str:
    """Returns the cause and the remedy of an error of a bucket, as text.

    Args:
        error: an error of fsspec, TensorStore, Orbax or the libraries below them.
        path: a path in the bucket.
    """
    scheme, bucket = scheme_of(path), bucket_of(path)
    texts = [f'{type(part).__name__}: {part}' for part in chain_of(error)]
    said = f'({type(error).__name__}: {" ".join(str(error).split())[:200]})'

    def has(marks: tuple[str, ...]) -> bool:
        return any(re.search('|'.join(marks), text) for text in texts)

    if has(NO_CREDENTIALS):
        return f'no credentials were found {said}. {CREDENTIALS[scheme]}'
    if has(EXPIRED):
        return f'the credentials have expired {said}. Renew them and run the same command again.'
    if has(REGION):
        return f'the bucket is in another region {said}. Set AWS_REGION to that of the bucket.'
    if has(REFUSED):
        return f'access is denied {said}. Required: {RIGHTS[scheme]}. Run the same command again to resume.'
    if has(MISSING):
        return f'there is no bucket {bucket!r}, or no such object {said}. Create the bucket, or correct the address.'
    return f'{said[1:-1]}. Run the same command again to resume.'


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes, the first cause last."""
    for _ in range(5):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def address_in(error: BaseException) -> str | None:
    """Returns the address in a bucket that our file systems noted on an error, or None."""
    notes = [note for part in chain_of(error) for note in getattr(part, '__notes__', [])]
    return next((note.partition(': ')[0] for note in notes if note.startswith(('gs://', 's3://'))), None)


def is_of_bucket(error: BaseException) -> bool:
    """Returns whether an error was raised by a library that reads buckets."""
    return any(type(part).__module__.split('.')[0] in LIBRARIES for part in chain_of(error)) or any(
        frame.filename.replace('\\', '/').rpartition('/site-packages/')[2].split('/')[0] in LIBRARIES
        for frame in traceback.extract_tb(error.__traceback__)
    )


def is_refused(text: str) -> bool:
    """Returns whether a library's message means denied access or missing credentials."""
    return re.search('|'.join((*REFUSED, *NO_CREDENTIALS, *EXPIRED)), text) is not None
