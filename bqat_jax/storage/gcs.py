"""An fsspec file system for Google Cloud Storage."""

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

# gcsfs logs every failed request with a traceback; lasting errors are raised anyway.
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
# Seconds to connect, and between parts of a response.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


FIELDS = 'items/name,prefixes,nextPageToken'


class Whole(io.BytesIO):
    """A small file that is sent when it is closed."""

    def __init__(self, system: 'GCS', path: str):
        super().__init__()
        self._system, self._path = system, path

    def __exit__(self, kind, *exception: Any) -> None:
        if kind is not None:
            super().close()  # an incomplete file is not sent
        super().__exit__(kind, *exception)

    def close(self) -> None:
        """Sends the content."""
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._system.pipe_file(self._path, content)


class GCS(Patient, GCSFileSystem):
    """GCSFileSystem that retries, never creates a bucket, and distinguishes denied access from a missing file."""

    scheme = 'gs'

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes the arguments of GCSFileSystem."""
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
        # Unwrapped, without the retries of GCSFileSystem: `repeat` retries.
        request = inspect.unwrap(GCSFileSystem._request)
        what = f'gs://{"/".join(str(part) for part in args)}: {method}'
        return await self.repeat(lambda: request(self, method, path, *args, **kwargs), what)

    async def _list_two(self, path: str) -> tuple[str, list[str], bool]:
        bucket, key, _ = self.split_path(path.rstrip('/'))
        if not key:
            return key, [], True
        try:
            response: Any = await self._call(
                'GET', 'b/{}/o', bucket, delimiter='/', prefix=key, maxResults=2, fields=FIELDS, json_out=True
            )
        except FileNotFoundError:  # the bucket does not exist
            return key, [], False
        keys = [item['name'] for item in response.get('items', [])] + response.get('prefixes', [])
        return key, keys, 'nextPageToken' in response

    def _open(self, path: str, mode: str = 'rb', **kwargs: Any) -> Any:
        """Opens a file; a written file is sent with one request when it is closed."""
        return Whole(self, path) if mode == 'wb' else super()._open(path, mode, **kwargs)

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Does nothing: buckets have no folders, and a missing bucket is an error."""
