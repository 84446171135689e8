"""Paths from the user: local ones, and addresses in buckets."""

import importlib.util
import os
import re
from pathlib import Path

import fsspec
from etils import epath

from bqat_jax.errors import UserError

# A path, local or in a bucket. Both have pathlib's methods; one in a bucket has no absolute() and no resolve(), and
# cannot be opened to append.
Place = Path | epath.Path

# Characters of a path that libraries would misread, and why.
MISREAD = {
    '*': 'libraries read it as a pattern',
    '?': 'libraries read it as a pattern',
    '[': 'libraries read it as a pattern',
    ']': 'libraries read it as a pattern',
    '\\': 'TensorStore reads it as a separator',
}
# By scheme: the package that reads buckets, the extra that installs it, and our file system based on it.
BUCKETS = {
    'gs': ('gcsfs', 'gcs', 'bqat_jax.storage.gcs.GCS'),
    's3': ('s3fs', 's3', 'bqat_jax.storage.s3.S3'),
}
# Seconds of patience after a request to stop.
GRACE = 10.0
# `storage.patience` by scheme; global, since libraries create the file systems.
_PATIENCE: dict[str, float] = {}
# Seconds after which TensorStore aborts and retries a stalled transfer.
STANDSTILL = '60'


def place(text: str | os.PathLike, name: str) -> Place:
    """Returns a path from the user, absolute and with `~` expanded, or an address in a bucket.

    Args:
        text: the path, or an address that begins with gs:// or s3://.
        name: flag or key that set it, for messages.

    Raises:
        UserError: for an empty path, a character that a library would misread, another scheme, or a scheme whose
            package is not installed.
    """
    given = f'{name}={str(text)!r}'
    if not str(text).strip():
        raise UserError(f'{given}: the path is empty. Use the path of a file or folder.')
    scheme, separator, rest = str(text).partition('://')
    if separator:
        _connect(scheme, given)
        if not rest.split('/')[0]:
            raise UserError(f'{given}: it names no bucket. Write {scheme}://BUCKET/FOLDER.')
        if '' in rest.rstrip('/').split('/') or {'.', '..'} & set(rest.split('/')):
            raise UserError(f'{given}: parts of an address in a bucket must not be empty, "." or "..". Write it out.')
        _check_characters(rest, given)
        return epath.Path(f'{scheme}://{rest.rstrip("/")}')
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', str(text)):
        address = str(text).replace(':/', '://', 1)
        raise UserError(f'{given}: it looks like an address with a missing slash. Write {address}.')
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name of an unknown user
        raise UserError(f'{given}: {error}. Write the folder out.') from error
    _check_characters(str(path), given)
    return path


def _check_characters(text: str, given: str) -> None:
    for character in text:
        if character in MISREAD or not character.isprintable():
            why = MISREAD.get(character, 'it is not printable')
            raise UserError(f'{given}: the path {text!r} has the character {character!r}: {why}. Rename it.')


def is_local(path: str | os.PathLike) -> bool:
    """Returns whether a path is in this machine's file system, not in a bucket."""
    return '://' not in os.fspath(path)


def scheme_of(path: str | os.PathLike) -> str:
    """Returns the scheme of an address in a bucket."""
    return os.fspath(path).partition('://')[0]


def bucket_of(path: str | os.PathLike) -> str:
    """Returns the bucket's name in an address."""
    return os.fspath(path).partition('://')[2].split('/')[0]


def filesystem_of(path: str | os.PathLike) -> fsspec.AbstractFileSystem:
    """Returns the file system of an address in a bucket."""
    return fsspec.filesystem(scheme_of(path))


def set_patience(seconds: float) -> None:
    """Sets the seconds for which failing requests to buckets are retried, in all libraries of this process."""
    for scheme in BUCKETS:
        _PATIENCE[scheme] = seconds


def shorten_patience(seconds: float = GRACE) -> None:
    """Shortens the patience before a shutdown; running requests respect it."""
    for scheme in BUCKETS:
        _PATIENCE[scheme] = min(patience_of(scheme), seconds)


def patience_of(scheme: str) -> float:
    """Returns the seconds for which failing requests to a scheme's buckets are retried."""
    return _PATIENCE.get(scheme, 600.0)


def _connect(scheme: str, given: str) -> None:
    """Registers our file system for a scheme in all libraries that use fsspec."""
    if scheme not in BUCKETS:
        known = ' or '.join(f'{name}://' for name in BUCKETS)
        raise UserError(
            f'{given}: paths that begin with {scheme}:// are not supported. Use a local path, or one that begins with '
            f'{known}.'
        )
    package, extra, own = BUCKETS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f'{given}: paths that begin with {scheme}:// need the package {package}, which is not installed. Install '
            f'it: pip install {package} (or the extra: pip install "bqat_jax[{extra}]").'
        )
    # An installed TensorFlow would make etils bypass our file systems.
    os.environ['EPATH_USE_TF'] = 'false'
    # Otherwise TensorStore waits forever for a server that accepts a connection and does not respond.
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', STANDSTILL)
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
    for name in ('gs', 'gcs') if scheme == 'gs' else ('s3',):
        fsspec.register_implementation(name, own, clobber=True)
    from bqat_jax.storage.orbax_stores import replace_stores

    replace_stores()
