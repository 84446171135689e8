"""A lease: holds a folder in a bucket, where there are no locks.

The folder `.lease` has a numbered object for every process that took it; the newest number holds it. A number is made
exclusively, by a condition that the server checks, so that of two processes one gets it. The holder renews its object;
one that is not renewed for long enough is taken over, by the next number. No clock is compared with another machine's:
who wants to take over watches the object for that long.
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
# The holder renews its lease so many times before it could be taken over, and who waits looks as often.
RENEWALS = 4
JOIN = 5.0  # seconds for a renewal that is under way to end


class Lease:
    """Holds a folder in a bucket while it is open, as a context manager."""

    def __init__(self, directory: Place, seconds: float):
        """Takes the folder, and the seconds after which a lease that was not renewed is taken over."""
        self._directory, self._seconds = directory, seconds
        own = {'host': socket.gethostname(), 'seconds': seconds, **_identity(os.getpid())}
        self._content = {'token': uuid.uuid4().hex, **own}
        self._number = 0
        self._renewals = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_repeatedly, name='lease', daemon=True)

    def __enter__(self) -> 'Lease':
        """Takes the lease, after the one before has ended.

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
        except Exception as error:  # it runs out by itself; what ended the run says more
            logger.warning('The lease of %s could not be given back (%s).', self._directory, type(error).__name__)

    def is_held(self) -> bool:
        """Returns whether no other process has taken over; asks the server."""
        return max(self._numbers(), default=0) == self._number

    def _take(self) -> int:
        newest = max(self._numbers(), default=0)
        if newest:
            self._wait_for_end(newest)
        mine = newest + 1
        if not self._make(mine) or max(self._numbers()) != mine:
            raise self._in_use('it was quicker')
        for number in self._numbers():
            if number < mine:  # never a higher one: it would be free to be made again while it is held
                self._path(number).unlink(missing_ok=True)
        return mine

    def _wait_for_end(self, number: int) -> None:
        """Returns once a lease has ended, or its process is dead or does not renew it."""
        before = self._read(number)
        if before is None or before.get('ended') or _is_dead(before):
            return
        theirs = before.get('seconds')
        seconds = max(self._seconds, theirs if isinstance(theirs, int | float) else 0)  # by which it is renewed
        logger.info(
            '%s is held by %s. Waiting to see whether its lease is renewed; after %g s (storage.lease_seconds) it is '
            'taken over.',
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
            f'{self._directory} is in use by another training process ({who}). Wait for it, or take another --workdir.'
        )

    def _make(self, number: int) -> bool:
        """Makes a number's object, if there is none; returns whether it is ours."""
        path = str(self._path(number))
        try:
            filesystem_of(path).pipe_file(path, self._bytes(), mode='create')
        except Exception as error:
            # The file systems say it in different ways. It may be ours all the same, if an answer was lost on the way.
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
                # Whether it is still held is asked again before each save.
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
        return content if isinstance(content, dict) else {'unreadable': repr(text)}  # waited for as any other

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
    """Another process has taken over."""

    def __init__(self):
        super().__init__(
            'This process was suspended, or could not reach its bucket, for so long that another one has taken over '
            'its workdir (storage.lease_seconds). It stops without writing; nothing is lost there.'
        )


@dataclasses.dataclass(frozen=True)
class Hold:
    """That a folder is held by this run.

    Attributes:
        lease: of the first process in a bucket; else None.
        is_in_bucket: whether the folder lies in a bucket, the same in all processes.
    """

    lease: Lease | None = None
    is_in_bucket: bool = False

    def is_held(self) -> bool:
        """Returns whether the run, as far as this process knows, still holds the folder."""
        return self.lease is None or self.lease.is_held()

    def check(self) -> None:
        """Checks that the folder is still held, before something is written; of several processes all call it.

        Raises:
            UserError: if another run has taken it over, as after this one was suspended.
        """
        if self.is_in_bucket and not agree(self.is_held() if is_first() else True):
            raise Lost()


def _identity(process: Any) -> dict[str, Any]:
    """What a process on this machine is known by; {} where the system does not tell."""
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        # Host names and numbers of processes repeat in containers; each has a namespace of its own.
        namespace = os.readlink('/proc/self/ns/pid')
        state, *fields = re.sub(r'(?s)^.*\)', '', Path(f'/proc/{process}/stat').read_text()).split()
    except OSError:
        return {}
    started = fields[18] if state != 'Z' else None  # killed, and not yet taken notice of by who started it
    return {'boot': boot, 'namespace': namespace, 'process': process, 'started': started}


def _is_dead(content: dict[str, Any]) -> bool:
    """Whether the process that wrote a lease is one of this machine's, and gone."""
    own = _identity(os.getpid())
    if not own or any(content.get(key) != own[key] for key in ('boot', 'namespace')):
        return False
    there = _identity(content.get('process', 0))
    return there.get('started') != content.get('started')


def _name(content: dict[str, Any]) -> str:
    return f'process {content.get("process", "?")} on {content.get("host", "?")}'
