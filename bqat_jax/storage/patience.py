"""Retries of requests that fail for a transient cause."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from bqat_jax.errors import UserError
from bqat_jax.storage.places import patience_of

logger = logging.getLogger(__name__)

Result = TypeVar('Result')
LONGEST_PAUSE = 32.0  # seconds
TRANSIENT_STATUS = (408, 425, 429, *range(500, 600))
# Seconds of retries before a warning is logged.
QUIET = 5.0


class BucketError(UserError):
    """A bucket denies access, does not respond or does not exist; the run itself is not at fault."""


class Unavailable(BucketError):
    """A bucket did not respond within `storage.patience`."""


class Patient:
    """A mix-in for fsspec file systems that retries failing requests until `storage.patience` has passed.

    A subclass defines its scheme and `is_transient(error)`.
    """

    scheme: str

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes the arguments of the file system."""
        kwargs['use_listings_cache'] = False  # other processes write too
        super().__init__(*args, **kwargs)

    @staticmethod
    def is_transient(error: Exception) -> bool:
        """Returns whether a request that failed with an error may succeed later."""
        raise NotImplementedError

    async def _list_two(self, path: str) -> tuple[str, list[str], bool]:
        """Returns a path's key, at most two keys with this prefix, and whether there are more.

        Keys are cut after the first slash that follows the path, so that a folder's key ends with a slash.
        """
        raise NotImplementedError

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """Lists a folder without the empty objects with which some programs mark folders."""
        entries = await super()._ls(path, detail=True, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        own = self._strip_protocol(path).rstrip('/')  # pyright: ignore[reportAttributeAccessIssue]
        kept = [
            entry
            for entry in entries
            if not entry['name'].endswith('/') and not (entry['name'] == own and entry['type'] == 'directory')
        ]
        return kept if detail else [entry['name'] for entry in kept]

    async def _exists(self, path: str, **kwargs: Any) -> bool:
        """Whether a file or folder exists, with one request instead of two or three."""
        key, keys, has_more = await self._list_two(path)
        if not has_more or {key, f'{key}/'} & set(keys):
            return bool({key, f'{key}/'} & set(keys))
        return await super()._exists(path, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    async def _isdir(self, path: str) -> bool:
        """Whether a folder exists; denied access is raised, where the base class returns False."""
        key, keys, has_more = await self._list_two(path)
        if not has_more or f'{key}/' in keys:
            return f'{key}/' in keys
        try:
            info = await self._info(path)  # pyright: ignore[reportAttributeAccessIssue]
        except (FileNotFoundError, NotADirectoryError):
            return False
        return info['type'] == 'directory'

    async def repeat(self, request: Callable[[], Awaitable[Result]], what: str) -> Result:
        """Returns the result of a request, which is retried.

        Args:
            request: starts the request.
            what: description of the request, for messages.

        Raises:
            Unavailable: if it still fails for a transient cause after `storage.patience`.
        """
        began, attempt = time.monotonic(), 0
        is_told = False
        while True:
            try:
                return await request()
            except Exception as error:
                if not self.is_transient(error):
                    error.add_note(what)
                    raise
                waited = time.monotonic() - began
                pause = min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                patience = patience_of(self.scheme)
                if waited + pause > patience:
                    raise Unavailable(
                        f'{what} failed for {waited:.0f} s (storage.patience={patience:g}): '
                        f'{type(error).__name__}: {str(error)[:200]}. Saved files are kept: run the same command '
                        'again to resume.'
                    ) from error
                if waited > QUIET and not is_told:
                    why = f'{type(error).__name__}: {error}'[:200]
                    logger.warning(
                        '%s fails (%s). It is retried for up to %g s (storage.patience).', what, why, patience
                    )
                    is_told = True
                attempt += 1
                await asyncio.sleep(pause)
