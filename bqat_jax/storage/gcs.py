"""Buckets of Google Cloud Storage as a file system of fsspec."""

import asyncio
import inspect
import io
import logging
from typing import Any

import aiohttp
import google.auth.exceptions
import requests
from gcsfs.core import GCSFileSystem
from gcsfs.retry import ChecksumError, HttpError

from bqat_jax.storage.patience import TRANSIENT_STATUS, Patient

# It logs every request that fails with a traceback; what is not mended is raised.
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
# Seconds in which an answer begins, or goes on.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


FIELDS = 'items/name,prefixes,nextPageToken'


class Whole(io.BytesIO):
    """A file that is sent when it is closed; all that is written this way here is small."""

    def __init__(self, system: 'GCS', path: str):
        super().__init__()
        self._system, self._path = system, path

    def __exit__(self, kind, *exception: Any) -> None:
        if kind is not None:
            super().close()  # nothing is sent of what was not written to its end
        super().__exit__(kind, *exception)

    def close(self) -> None:
        """Sends what was written."""
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._system.pipe_file(self._path, content)


class GCS(Patient, GCSFileSystem):
    """GCSFileSystem that is patient, never makes a bucket, and tells a refusal from a file that is not there."""

    scheme = 'gs'

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes what GCSFileSystem takes."""
        super().__init__(*args, **{'requests_timeout': TIMEOUT, **kwargs})

    @staticmethod
    def is_transient(error: Exception) -> bool:
        """Returns whether a request that failed with an error may succeed later."""
        if isinstance(error, HttpError):
            return error.code is not None and int(error.code) in TRANSIENT_STATUS
        passing = (
            aiohttp.ClientError,
            requests.exceptions.RequestException,
            google.auth.exceptions.TransportError,
            ChecksumError,
            ConnectionError,
            TimeoutError,
            asyncio.TimeoutError,
        )
        return isinstance(error, passing)

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        # Without the repetitions of GCSFileSystem's own, which know of no patience.
        request = inspect.unwrap(GCSFileSystem._request)
        what = f'gs://{"/".join(str(part) for part in args)}: {method}'
        return await self.repeat(lambda: request(self, method, path, *args, **kwargs), what)

    async def _list_two(self, path: str) -> tuple[str, list[str], bool]:
        bucket, key, _ = self.split_path(path.rstrip('/'))
        if not key:
            return key, [], True
        try:
            found: Any = await self._call(
                'GET', 'b/{}/o', bucket, delimiter='/', prefix=key, maxResults=2, fields=FIELDS, json_out=True
            )
        except FileNotFoundError:  # there is no such bucket
            return key, [], False
        keys = [item['name'] for item in found.get('items', [])] + found.get('prefixes', [])
        return key, keys, 'nextPageToken' in found

    def _open(self, path: str, mode: str = 'rb', **kwargs: Any) -> Any:
        """Opens a file; one that is written is sent by one request when it is closed."""
        return Whole(self, path) if mode == 'wb' else super()._open(path, mode, **kwargs)

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there are no folders, and a missing bucket is an error, not to be made."""
