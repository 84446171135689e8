"""Requests that fail for a while are repeated; those that are refused are not."""

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
# So many seconds of trouble are nothing to speak of.
QUIET = 5.0


class BucketError(UserError):
    """A bucket refuses, does not answer, or is not there: nothing that a run has done is wrong."""


class Unavailable(BucketError):
    """A bucket did not answer for as long as the patience lasted."""


class Patient:
    """A part of a file system of fsspec: repeats requests that fail for a while, until the patience is over.

    A class that is built with it says its scheme, and which errors pass by: `is_transient(error)`.
    """

    scheme: str

    def __init__(self, *args: Any, **kwargs: Any):
        """Takes what the file system takes."""
        kwargs['use_listings_cache'] = False  # other processes write too
        super().__init__(*args, **kwargs)

    @staticmethod
    def is_transient(error: Exception) -> bool:
        """Returns whether a request that failed with an error may succeed later."""
        raise NotImplementedError

    async def _list_two(self, path: str) -> tuple[str, list[str], bool]:
        """Lists a bucket from a path on: the path's key, two keys that begin with it, and whether there are more.

        What follows a slash after the path is left out of the keys, so that a folder's key ends with one.
        """
        raise NotImplementedError

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """Lists a folder without the empty objects by which some programs mark folders, such as itself."""
        entries = await super()._ls(path, detail=True, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        own = self._strip_protocol(path).rstrip('/')  # pyright: ignore[reportAttributeAccessIssue]
        kept = [
            entry
            for entry in entries
            if not entry['name'].endswith('/') and not (entry['name'] == own and entry['type'] == 'directory')
        ]
        return kept if detail else [entry['name'] for entry in kept]

    async def _exists(self, path: str, **kwargs: Any) -> bool:
        """Whether there is a file or a folder; one request, where the file systems below need two or three."""
        key, keys, has_more = await self._list_two(path)
        if not has_more or {key, f'{key}/'} & set(keys):
            return bool({key, f'{key}/'} & set(keys))
        return await super()._exists(path, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    async def _isdir(self, path: str) -> bool:
        """Whether there is a folder. A refusal is raised, which the file systems below take for a no."""
        key, keys, has_more = await self._list_two(path)
        if not has_more or f'{key}/' in keys:
            return f'{key}/' in keys
        try:
            info = await self._info(path)  # pyright: ignore[reportAttributeAccessIssue]
        except (FileNotFoundError, NotADirectoryError):
            return False
        return info['type'] == 'directory'

    async def repeat(self, request: Callable[[], Awaitable[Result]], what: str) -> Result:
        """Returns the result of a request.

        Args:
            request: begins the request anew each time.
            what: is asked for, in words.

        Raises:
            Unavailable: if it still fails, in a way that may pass, when the patience is over.
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
                        f'{type(error).__name__}: {str(error)[:200]}. What was saved is kept: run the same command '
                        'again to go on.'
                    ) from error
                if waited > QUIET and not is_told:
                    why = f'{type(error).__name__}: {error}'[:200]
                    logger.warning(
                        '%s fails (%s). It is tried again for up to %g s (storage.patience).', what, why, patience
                    )
                    is_told = True
                attempt += 1
                await asyncio.sleep(pause)
