"""Whether a bucket can be used, before anything is computed; and what its errors mean."""

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
# What the libraries' errors have in their texts, as regular expressions, by what is wrong.
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
    """Checks that a folder in a bucket can be listed, and a file in it be written, read and deleted.

    Nothing is done for a local folder.

    Args:
        directory: need not be there; its bucket must be.
        name: of the flag or key that gave it, for messages.

    Raises:
        UserError: naming what cannot be done, and the remedy.
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
        found = system.cat_file(probe)
    if found != content:
        raise UserError(
            f'{name}={str(directory)!r}: a file that was written there is read with another content. Is there a cache '
            'or a proxy on the way?'
        )
    with explained(f'{name}={str(directory)!r}: a file that was written there cannot be deleted', directory):
        system.rm_file(probe)


def check_listed(directory: Place, name: str) -> None:
    """Checks that a folder in a bucket can be listed, which is read and not written.

    Raises:
        UserError: naming what is wrong, and the remedy.
    """
    if not is_local(directory):
        bucket = f'{scheme_of(directory)}://{bucket_of(directory)}'
        with explained(f'{name}={str(directory)!r}: its bucket {bucket} cannot be listed', directory):
            _list(filesystem_of(directory), bucket, str(directory))


def check_objects(directory: Place) -> None:
    """Reads the first byte of some objects below a folder in a bucket, the largest and the smallest.

    Raises:
        Exception: of the libraries, if one may not be read or its bucket does not answer.
    """
    sizes = {name: int(facts['size'] or 0) for name, facts in files_below(directory).items()}
    names = sorted((name for name in sizes if sizes[name]), key=lambda name: sizes[name])
    system = filesystem_of(directory)
    for name in {*names[:MOST_TRIED], *names[-MOST_TRIED:]}:
        system.cat_file(f'{directory}/{name}', 0, 1)


def _check_exclusive(system, probe: str, given: str) -> None:
    """Checks that a file which is there cannot be made: so a run holds its folder alone."""
    try:
        system.pipe_file(probe, b'', mode='create')
    except Unavailable:
        raise
    except Exception:  # the file systems refuse it in different ways
        return
    raise UserError(
        f'{given}: the store makes a file that is there although it was asked not to (If-None-Match), so that two runs '
        'could write into one folder. Take another store.'
    )


def _list(system, bucket: str, directory: str) -> None:
    """Lists a folder. One that is not there yet, in a bucket that is, is an empty one."""
    try:
        system.ls(directory, detail=False)
    except FileNotFoundError as error:
        if not system.exists(bucket):
            raise FileNotFoundError(f'The specified bucket does not exist: {bucket}') from error


@contextlib.contextmanager
def explained(what: str, path: Place) -> Iterator[None]:
    """Within it errors of a bucket become UserErrors that say what is wrong and what can be done.

    Args:
        what: could not be done, as the beginning of a sentence.
        path: in the bucket.
    """
    try:
        yield
    except UserError as error:
        kind = BucketError if isinstance(error, BucketError) else UserError
        raise kind(f'{what}: {error}') from error
    except Exception as error:  # every library of a bucket has errors of its own
        raise BucketError(f'{what}: {explain(error, path)}') from error


def explain(error: BaseException, path: Place | str) -> str:
    """Returns what an error of a bucket means and what can be done, in words.

    Args:
        error: of fsspec, TensorStore, Orbax or what lies below them.
        path: in the bucket.
    """
    scheme, bucket = scheme_of(path), bucket_of(path)
    texts = [f'{type(part).__name__}: {part}' for part in chain_of(error)]
    said = f'({type(error).__name__}: {" ".join(str(error).split())[:200]})'

    def has(marks: tuple[str, ...]) -> bool:
        return any(re.search('|'.join(marks), text) for text in texts)

    if has(NO_CREDENTIALS):
        return f'no credentials were found {said}. {CREDENTIALS[scheme]}'
    if has(EXPIRED):
        return f'the credentials have expired {said}. Renew them, and run the same command again.'
    if has(REGION):
        return f'the bucket lies in another region {said}. Set AWS_REGION to that of the bucket.'
    if has(REFUSED):
        return f'it is refused {said}. What is needed: {RIGHTS[scheme]}. Run the same command again to go on.'
    if has(MISSING):
        return f'there is no bucket {bucket!r}, or no such object {said}. Make the bucket, or correct the address.'
    return f'{said[1:-1]}. Run the same command again to go on.'


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it was raised from, the first cause last."""
    for _ in range(5):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def address_in(error: BaseException) -> str | None:
    """Returns the address in a bucket that an error is of, as our file systems note it; None if it has no such note."""
    notes = [note for part in chain_of(error) for note in getattr(part, '__notes__', [])]
    return next((note.partition(': ')[0] for note in notes if note.startswith(('gs://', 's3://'))), None)


def is_of_bucket(error: BaseException) -> bool:
    """Returns whether an error was raised by a library that reads buckets."""
    return any(type(part).__module__.split('.')[0] in LIBRARIES for part in chain_of(error)) or any(
        frame.filename.replace('\\', '/').rpartition('/site-packages/')[2].split('/')[0] in LIBRARIES
        for frame in traceback.extract_tb(error.__traceback__)
    )


def is_refused(text: str) -> bool:
    """Returns whether a library's words say that something may not be done, or that nobody is known to ask."""
    return re.search('|'.join((*REFUSED, *NO_CREDENTIALS, *EXPIRED)), text) is not None
