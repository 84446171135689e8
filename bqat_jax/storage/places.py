"""Paths that a user gives: local ones, and those in buckets."""

import importlib.util
import os
import re
from pathlib import Path

import fsspec
from etils import epath

from bqat_jax.errors import UserError

# A path: local, or in a bucket. Both have pathlib's methods; those in buckets have no absolute() and no resolve(), and
# cannot be opened to append.
Place = Path | epath.Path

# What the libraries below would misread in a path, and why.
MISREAD = {
    '*': 'file names are matched with it as a pattern',
    '?': 'file names are matched with it as a pattern',
    '[': 'file names are matched with it as a pattern',
    ']': 'file names are matched with it as a pattern',
    '\\': 'TensorStore takes it for a separator',
}
# Schemes of buckets: the package that reads them, the extra that installs it, and our file system on top of it.
BUCKETS = {
    'gs': ('gcsfs', 'gcs', 'bqat_jax.storage.gcs.GCS'),
    's3': ('s3fs', 's3', 'bqat_jax.storage.s3.S3'),
}
# Seconds of patience once a process was told to end.
GRACE = 10.0
# What `storage.patience` says; file systems live as long as the process, and are made by others.
_PATIENCE: dict[str, float] = {}
# A transfer of TensorStore's that stands still for so many seconds is broken off and tried again.
STANDSTILL = '60'


def place(text: str | os.PathLike, name: str) -> Place:
    """Returns a path that a user gave: absolute, with `~` as the home folder; or in a bucket.

    Args:
        text: the path, or an address that begins with gs:// or s3://.
        name: of the flag or key that gave it, for messages.

    Raises:
        UserError: for a path that is empty or has a character that a library would misread, for another scheme, or one
            whose package is not installed.
    """
    given = f'{name}={str(text)!r}'
    if not str(text).strip():
        raise UserError(f'{given}: the path is empty. Give the path of a file or folder.')
    scheme, separator, rest = str(text).partition('://')
    if separator:
        _connect(scheme, given)
        if not rest.split('/')[0]:
            raise UserError(f'{given}: it names no bucket. Write {scheme}://BUCKET/FOLDER.')
        if '' in rest.rstrip('/').split('/') or {'.', '..'} & set(rest.split('/')):
            raise UserError(f'{given}: parts of an address in a bucket are not empty, and not . or ..; write it out.')
        _check_characters(rest, given)
        return epath.Path(f'{scheme}://{rest.rstrip("/")}')
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]+:/', str(text)):
        address = str(text).replace(':/', '://', 1)
        raise UserError(f'{given}: it looks like an address in which a slash is missing. Write {address}.')
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:  # ~name of a user that there is not
        raise UserError(f'{given}: {error}. Write the folder out.') from error
    _check_characters(str(path), given)
    return path


def _check_characters(text: str, given: str) -> None:
    for character in text:
        if character in MISREAD or not character.isprintable():
            why = MISREAD.get(character, 'it cannot be seen')
            raise UserError(f'{given}: the path {text!r} has the character {character!r}, and {why}. Rename it.')


def is_local(path: str | os.PathLike) -> bool:
    """Returns whether a path lies in this machine's file system, and not in a bucket."""
    return '://' not in os.fspath(path)


def scheme_of(path: str | os.PathLike) -> str:
    """Returns the scheme of an address in a bucket."""
    return os.fspath(path).partition('://')[0]


def bucket_of(path: str | os.PathLike) -> str:
    """Returns the name of the bucket of an address."""
    return os.fspath(path).partition('://')[2].split('/')[0]


def filesystem_of(path: str | os.PathLike) -> fsspec.AbstractFileSystem:
    """Returns the file system of an address in a bucket."""
    return fsspec.filesystem(scheme_of(path))


def set_patience(seconds: float) -> None:
    """Sets for how long requests to buckets that fail are repeated, for all libraries of this process."""
    for scheme in BUCKETS:
        _PATIENCE[scheme] = seconds


def shorten_patience(seconds: float = GRACE) -> None:
    """Shortens the patience, as when the machine is about to be taken away; requests under way notice it."""
    for scheme in BUCKETS:
        _PATIENCE[scheme] = min(patience_of(scheme), seconds)


def patience_of(scheme: str) -> float:
    """Returns for how long requests to a scheme's buckets that fail are repeated, in seconds."""
    return _PATIENCE.get(scheme, 600.0)


def _connect(scheme: str, given: str) -> None:
    """Makes a scheme's buckets usable by our own file system in all libraries that go through fsspec."""
    if scheme not in BUCKETS:
        known = ' or '.join(f'{name}://' for name in BUCKETS)
        raise UserError(
            f'{given}: paths that begin with {scheme}:// are not supported. Give a local path, or one that begins with '
            f'{known}.'
        )
    package, extra, own = BUCKETS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f'{given}: paths that begin with {scheme}:// need the package {package}, which is not installed. Install '
            f'it: pip install {package} (or the extra: pip install "bqat_jax[{extra}]").'
        )
    # etils would read buckets by TensorFlow where that is installed, without what our file systems see to.
    os.environ['EPATH_USE_TF'] = 'false'
    # Otherwise a server that accepts a connection and says nothing is waited for without end.
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', STANDSTILL)
    os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1')
    for name in ('gs', 'gcs') if scheme == 'gs' else ('s3',):
        fsspec.register_implementation(name, own, clobber=True)
    from bqat_jax.storage.orbax_stores import replace_stores

    replace_stores()
