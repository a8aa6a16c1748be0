"""Turns at a link to the host's memory that several processes share.

Boards behind one PCIe root divide its rate, so two copies at once are both late. Here they go one
after the other: a swap for the whole of its copy and in the order in which swaps asked, copies in
the background piece by piece, between the swaps. It owns one small file per link, and the order.
It never copies, and it never fails a copy: where the file cannot be had, or a turn does not come
within its limit, the copy goes on beside the others and its turn says so. Invariants: of those
that have their turn one copies at a time; a swap waits for one piece in the background at most;
what a process held is free once it has died, since locks end with the descriptor.

The file's bytes are locked rather than written (open file description locks, one descriptor per
turn, so that turns of one process exclude each other too). Whoever wants a turn draws a number and
locks the byte of it: the kernel then knows the queue, and forgets who dies in it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from pathlib import Path
from typing import Protocol

SWAP_WAIT_S_MAX = 10.0
"""A swap whose turn has not come by then copies beside the others: 10 s are 550 GB at 55 GB/s, more
than a GPU holds, so whoever is before it is slow for another reason, or many are."""
BACKGROUND_WAIT_S_MAX = 60.0
"""One piece of a background copy waits so long at most: swaps without end must not starve it."""
POLL_S = 0.001
"""Time between two looks at the queue; what a swap loses when the one before it ends."""

_MUTEX, _PIECE = 0, 1
"""Bytes that are locked while a number is drawn, and while a piece is copied in the background."""
_LANE_BYTES = 1 << 56
_SWAPS, _BACKGROUND = _LANE_BYTES, 2 * _LANE_BYTES
"""Where the bytes of drawn numbers begin."""
_COUNTER = struct.Struct("=q")
_FLOCK = struct.Struct("hhqqi0q")
"""The kernel's struct flock: type, whence, start, length, pid (0 for these locks)."""

log = logging.getLogger(__name__)


class Turn(Protocol):
    """One copy's turns at its link. Of one thread."""

    @property
    def whole(self) -> bool:
        """Whether the turn is for the whole copy, so that pieces may queue; else for a piece."""

    @property
    def waiting(self) -> bool:
        """Whether the first turn is still to come. For any thread."""

    @property
    def waited_s(self) -> float:
        """Time spent waiting so far."""

    @property
    def missed(self) -> bool:
        """Whether a copy went on without its turn."""

    def take(self, given_up: threading.Event) -> None:
        """Return when it is this copy's turn, its limit is over, or `given_up` is set."""

    def pause(self) -> None:
        """A piece is complete and nothing is being copied: others may go, but for a swap's turn."""

    def end(self) -> None:
        """The copy is over. Idempotent."""


class Link(Protocol):
    """A link. Any thread."""

    def turn(self, *, background: bool = False) -> Turn:
        """Turns for one copy; nothing is asked for before `take`."""


class OwnTurn:
    """The turn of a copy over a link that nobody else uses."""

    waiting = False
    waited_s = 0.0
    missed = False

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole

    def take(self, given_up: threading.Event) -> None:
        """At once."""

    def pause(self) -> None:
        """Nobody waits."""

    def end(self) -> None:
        """Nobody waits."""


class OwnLink:
    """A link that no other process uses."""

    def turn(self, *, background: bool = False) -> OwnTurn:
        return OwnTurn(whole=not background)


class SharedLink:
    """The link whose file is `path`: the same for every process that shares it."""

    def __init__(
        self,
        path: Path,
        *,
        swap_wait_s: float = SWAP_WAIT_S_MAX,
        background_wait_s: float = BACKGROUND_WAIT_S_MAX,
    ) -> None:
        self.path = path
        self._limits_s = (swap_wait_s, background_wait_s)

    def turn(self, *, background: bool = False) -> FileTurn:
        return FileTurn(self.path, background=background, wait_s_max=self._limits_s[background])


class FileTurn:
    """See `Turn`. The file is opened at the first `take`, made if there is none."""

    def __init__(self, path: Path, *, background: bool, wait_s_max: float) -> None:
        self.whole = not background
        self.waiting = True
        self.waited_s = 0.0
        self.missed = False
        self.number = 0
        """Drawn for the turn it has or waits for; later ones are larger within swaps, or pieces."""
        self._path = path
        self._wait_s_max = wait_s_max
        self._file: int | None = None
        self._held = False

    def take(self, given_up: threading.Event) -> None:
        if self._held:
            return
        started = time.monotonic()
        try:
            self._wait(started + self._wait_s_max, given_up)
        except OSError as error:
            self.missed = True
            log.warning("a copy goes on without a turn at the link %s: %s", self._path, error)
        finally:
            self._held = True
            self.waiting = False
            self.waited_s += time.monotonic() - started

    def pause(self) -> None:
        if not self.whole:
            self.end()

    def end(self) -> None:
        # Whoever closes the descriptor gives up every lock that was taken through it.
        file, self._file = self._file, None
        self._held = False
        if file is not None:
            os.close(file)

    # Inside.

    def _wait(self, deadline: float, given_up: threading.Event) -> None:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lane = _SWAPS if self.whole else _BACKGROUND
        while not self._draw(lane):
            if self._late(deadline, given_up):
                return
        while not (self._first_swap() if self.whole else self._first_piece()):
            if self._late(deadline, given_up):
                return

    def _late(self, deadline: float, given_up: threading.Event) -> bool:
        """Wait until the next look, unless there is no point in one."""
        if given_up.is_set():
            return True
        if time.monotonic() >= deadline:
            self.missed = True
            log.warning(
                "a copy waited %g s for its turn at the link %s and goes on without it: another "
                "process holds the link for long",
                self._wait_s_max,
                self._path,
            )
            return True
        given_up.wait(POLL_S)
        return False

    def _draw(self, lane: int) -> bool:
        """Draw the next number and lock its byte; False when another process is at it."""
        if not self._lock(_MUTEX):
            return False
        place = _COUNTER.size * (lane // _LANE_BYTES)
        assert self._file is not None
        last = os.pread(self._file, _COUNTER.size, place)
        self.number = 1 + (_COUNTER.unpack(last)[0] if len(last) == _COUNTER.size else 0)
        os.pwrite(self._file, _COUNTER.pack(self.number), place)
        # Announced before the mutex is free: whoever draws a later number finds this one locked.
        self._lock(lane + self.number)
        self._unlock(_MUTEX)
        return True

    def _first_swap(self) -> bool:
        """Whether no earlier swap is left, nor a piece under way: none begins any more."""
        return self._free(_SWAPS, self.number) and self._free(_PIECE, 1)

    def _first_piece(self) -> bool:
        """Whether no earlier piece is left, and no swap. Both sides announce themselves before
        they look, so of a swap and a piece at the same moment one at least sees the other."""
        if not self._free(_BACKGROUND, self.number) or not self._lock(_PIECE):
            return False
        if self._free(_SWAPS, _LANE_BYTES):
            return True
        self._unlock(_PIECE)
        return False

    def _free(self, start: int, length: int) -> bool:
        """Whether nobody else has a lock in a range."""
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        assert self._file is not None
        found: int = _FLOCK.unpack(fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, wanted))[0]
        return found == fcntl.F_UNLCK

    def _lock(self, byte: int) -> bool:
        """Lock a byte; False when somebody else has."""
        try:
            self._set(byte, fcntl.F_WRLCK)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def _unlock(self, byte: int) -> None:
        self._set(byte, fcntl.F_UNLCK)

    def _set(self, byte: int, kind: int) -> None:
        assert self._file is not None
        wanted = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, wanted)
