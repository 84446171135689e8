"""Buckets of Google Cloud Storage as a file system of fsspec."""

import asyncio
import inspect
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


class GCS(Patient, GCSFileSystem):
    """GCSFileSystem that is patient, never makes a bucket, and tells a refusal from a file that is not there."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes what GCSFileSystem takes, and the patience."""
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

    async def _isdir(self, path: str) -> bool:
        """Whether it is a folder; GCSFileSystem says that it is none where it may not look."""
        try:
            info: Any = await self._info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return info['type'] == 'directory'

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Does nothing: there are no folders, and a missing bucket is an error, not to be made."""
