"""Leases, which give exclusive access to a folder in a bucket, where there are no locks.

The folder `.lease` has a numbered object for every process that acquired it; the highest number holds it. The server
creates a number only if it does not exist, so that one of two processes gets it. The holder renews its object; if it
does not for long enough, another process acquires the next number. Clocks of machines are never compared: the waiting
process watches the object for that long.
"""

import dataclasses
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from bqat_jax.distributed.processes import agree, is_first
from bqat_jax.errors import UserError
from bqat_jax.storage.files import write_bytes
from bqat_jax.storage.places import Place, filesystem_of

logger = logging.getLogger(__name__)

FOLDER = '.lease'
# Renewals within the lease time; a waiting process polls as often.
RENEWALS = 4
JOIN = 5.0  # seconds to wait for a running renewal


class Lease:
    """A context manager that holds a folder in a bucket."""

    def __init__(self, directory: Place, seconds: float):
        """Takes the folder, and the seconds after which another process may acquire a lease that is not renewed."""
        self._directory, self._seconds = directory, seconds
        own = {'host': socket.gethostname(), 'seconds': seconds, **_identity(os.getpid())}
        self._content = {'token': uuid.uuid4().hex, **own}
        self._number = 0
        self._renewals = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_repeatedly, name='lease', daemon=True)

    def __enter__(self) -> 'Lease':
        """Acquires the lease once the previous one has ended.

        Raises:
            UserError: if another process holds it.
        """
        self._number = self._take()
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._ended.set()
        self._thread.join(JOIN)
        try:
            if self.is_held():
                self._write(ended=True)
        except Exception as error:  # the lease expires, and the error that ended the run says more
            logger.warning('The lease of %s could not be released (%s).', self._directory, type(error).__name__)

    def is_held(self) -> bool:
        """Returns whether this process still holds the lease; asks the server."""
        return max(self._numbers(), default=0) == self._number

    def _take(self) -> int:
        newest = max(self._numbers(), default=0)
        if newest:
            self._wait_for_end(newest)
        mine = newest + 1
        if not self._make(mine) or max(self._numbers()) != mine:
            raise self._in_use('it was quicker')
        for number in self._numbers():
            if number < mine:  # a higher number may be held and must not become free
                self._path(number).unlink(missing_ok=True)
        return mine

    def _wait_for_end(self, number: int) -> None:
        """Returns once a lease has ended, or its process is dead or has stopped renewing it."""
        before = self._read(number)
        if before is None or before.get('ended') or _is_dead(before):
            return
        theirs = before.get('seconds')
        seconds = max(
            self._seconds, theirs if isinstance(theirs, int | float) else 0
        )  # the holder's renewal depends on its own setting
        logger.info(
            '%s is held by %s. Waiting %g s (storage.lease_seconds) for its lease to be renewed; if it is not, this '
            'process takes over.',
            self._directory,
            _name(before),
            seconds,
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(seconds / RENEWALS, max(0.0, end - time.monotonic())) or 0.01)
            now = self._read(number)
            if now is None or now.get('ended'):
                return
            if now != before:
                raise self._in_use(_name(now))
        if max(self._numbers(), default=0) != number:
            raise self._in_use('it was quicker')

    def _in_use(self, who: str) -> 'InUse':
        return InUse(
            f'{self._directory} is in use by another training process ({who}). Wait for it, or use another --workdir.'
        )

    def _make(self, number: int) -> bool:
        """Creates a number's object if it does not exist; returns whether it is ours."""
        path = str(self._path(number))
        try:
            filesystem_of(path).pipe_file(path, self._bytes(), mode='create')
        except Exception as error:
            # The file systems raise different errors. The object may still be ours if a response was lost.
            now = self._read(number)
            if now is None:
                raise error
            return now.get('token') == self._content['token']
        return True

    def _renew_repeatedly(self) -> None:
        while not self._ended.wait(self._seconds / RENEWALS):
            try:
                if not self.is_held():
                    return
                self._write()
            except Exception as error:
                # `Hold.check` asks again before each save.
                logger.warning('The lease of %s could not be renewed (%s).', self._directory, str(error)[:200])

    def _write(self, **more: Any) -> None:
        self._renewals += 1
        write_bytes(self._path(self._number), self._bytes(**more))

    def _bytes(self, **more: Any) -> bytes:
        return json.dumps({**self._content, 'renewals': self._renewals, **more}).encode()

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            text = filesystem_of(self._directory).cat_file(str(self._path(number)))
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        return content if isinstance(content, dict) else {'unreadable': repr(text)}  # treated as a lease in use

    def _numbers(self) -> list[int]:
        try:
            paths = filesystem_of(self._directory).ls(str(self._directory / FOLDER), detail=False)
        except FileNotFoundError:
            return []
        names = [str(path).rpartition('/')[2] for path in paths]
        return [int(name) for name in names if re.fullmatch('[0-9]+', name)]

    def _path(self, number: int) -> Place:
        return self._directory / FOLDER / f'{number:06}'


class InUse(UserError):
    """Another process holds a folder."""


class Lost(UserError):
    """Another process has acquired the lease."""

    def __init__(self):
        super().__init__(
            'This process was suspended, or could not reach its bucket, for so long that another one has taken over '
            'its workdir (storage.lease_seconds). It stops without writing; nothing in the workdir is lost.'
        )


@dataclasses.dataclass(frozen=True)
class Hold:
    """Exclusive write access of a run to a folder.

    Attributes:
        lease: the lease, in the first process and for a bucket; else None.
        is_in_bucket: whether the folder is in a bucket; equal in all processes.
    """

    lease: Lease | None = None
    is_in_bucket: bool = False

    def is_held(self) -> bool:
        """Returns whether the run still holds the folder, as far as this process knows."""
        return self.lease is None or self.lease.is_held()

    def check(self) -> None:
        """Checks that the folder is still held, before a write; all processes must call it.

        Raises:
            UserError: if another run holds the folder, for example after this one was suspended.
        """
        if self.is_in_bucket and not agree(self.is_held() if is_first() else True):
            raise Lost()


def _identity(process: Any) -> dict[str, Any]:
    """The identity of a process on this machine; {} if the system does not report it."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        # Host names and process numbers repeat in containers; namespaces do not.
        namespace = os.readlink('/proc/self/ns/pid')
        state, *fields = re.sub(r'(?s)^.*\)', '', Path(f'/proc/{process}/stat').read_text()).split()
    except OSError:
        return {}
    started = fields[18] if state != 'Z' else None  # Z: killed, and not yet reaped by its parent
    return {'boot': boot, 'namespace': namespace, 'process': process, 'started': started}


def _is_dead(content: dict[str, Any]) -> bool:
    """Whether the process that wrote a lease ran on this machine and is gone."""
    own = _identity(os.getpid())
    if not own or any(content.get(key) != own[key] for key in ('boot', 'namespace')):
        return False
    there = _identity(content.get('process', 0))
    return there.get('started') != content.get('started')


def _name(content: dict[str, Any]) -> str:
    return f'process {content.get("process", "?")} on {content.get("host", "?")}'
