"""The journal: everything hotbayd must still know after it was killed, in one SQLite file.

It owns the file and the one thread that touches it. Memory is the truth while the daemon runs;
every change is written through, as one transaction that is on disk before `commit` returns, and
read back whole at start. It never interprets a record. The invariant: what was acknowledged is
there after a power cut, and a damaged file is put aside and named, never half believed.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from daemon.control.errors import JournalFailed
from daemon.control.state.records import (
    Cordon,
    KeptLayout,
    Label,
    LinkRate,
    Operation,
    Placement,
    UnitRecord,
    Version,
)
from partitioner.cutting import LayoutChange, Owned

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0
WAL_BYTES_MAX = 4 << 20
FILE_NAME = "journal.db"

_KINDS: dict[type, str] = {
    Version: "version",
    Label: "label",
    Placement: "placement",
    Operation: "operation",
    LinkRate: "link",
    Owned: "instance",
    LayoutChange: "layout",
    Cordon: "cordon",
    KeptLayout: "kept layout",
    UnitRecord: "health",
}
_TYPES: dict[str, type] = {kind: type_ for type_, kind in _KINDS.items()}

log = logging.getLogger(__name__)

Record = (
    Version
    | Label
    | Placement
    | Operation
    | LinkRate
    | Owned
    | LayoutChange
    | Cordon
    | KeptLayout
    | UnitRecord
)


@dataclass(frozen=True)
class Put:
    """Write a record, in place of an earlier one of the same key."""

    record: Record


@dataclass(frozen=True)
class Drop:
    """Remove a record."""

    record: Record


@dataclass(frozen=True)
class Contents:
    """The journal as found at start. `warning` says what was wrong with it, if anything was."""

    versions: tuple[Version, ...] = ()
    labels: tuple[Label, ...] = ()
    placements: tuple[Placement, ...] = ()
    operations: tuple[Operation, ...] = ()
    links: tuple[LinkRate, ...] = ()
    owned: tuple[Owned, ...] = ()
    layout_change: LayoutChange | None = None
    """The change of layout that was under way."""
    cordons: tuple[Cordon, ...] = ()
    kept_layout: KeptLayout | None = None
    """How the GPUs were cut by us when that was last changed."""
    units: tuple[UnitRecord, ...] = ()
    """GPUs and GPU instances that are not healthy."""
    warning: str = ""


class _Damaged(Exception):
    """The file is not what this program wrote."""


class Journal:
    """An open journal; make it with `open`, in the directory whose lock is held."""

    def __init__(self, path: Path, thread: ThreadPoolExecutor, database: sqlite3.Connection):
        self.path = path
        self._thread = thread
        self._database = database
        self._closed = False

    @classmethod
    async def open(cls, directory: Path) -> tuple[Journal, Contents]:
        """Open or create the journal, and read all of it.

        A damaged file is renamed to `journal.db.damaged-<time>` and an empty one takes its place:
        the repository and the workers then tell what there is. Raises JournalFailed when no file
        can be written, or when a newer program wrote it.
        """
        path = directory / FILE_NAME
        thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        try:
            database, contents = await asyncio.get_running_loop().run_in_executor(
                thread, _open, path
            )
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(path, thread, database), contents

    async def commit(self, changes: Iterable[Put | Drop]) -> None:
        """Make the changes durable, all or none. Raises JournalFailed."""
        if self._closed:
            raise JournalFailed(f"the journal {self.path} is closed: the daemon is stopping")
        rows = [_row(change) for change in changes]
        if rows:
            # Shielded: a caller that is cancelled meanwhile must not leave it in doubt whether the
            # transaction of another caller, queued behind on the same thread, was written.
            await asyncio.shield(
                asyncio.get_running_loop().run_in_executor(self._thread, self._write, rows)
            )

    async def close(self) -> None:
        """Finish what is queued and close the file. Idempotent."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._database.close)
            self._thread.shutdown()

    def _write(self, rows: list[tuple[str, str, bytes | None]]) -> None:
        try:
            with self._database:
                for kind, key, value in rows:
                    if value is None:
                        self._database.execute(
                            "DELETE FROM records WHERE kind = ? AND key = ?", (kind, key)
                        )
                    else:
                        self._database.execute(
                            "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)",
                            (kind, key, value, _checksum(kind, key, value)),
                        )
        except sqlite3.Error as error:
            raise JournalFailed(
                f"cannot write the journal {self.path}: {error}. Is the disk full or read-only?"
            ) from error


def _key(record: Record) -> str:
    if isinstance(record, Version):
        return record.key
    if isinstance(record, Label):
        return f"{record.model}@{record.label}"
    if isinstance(record, Placement):
        return record.model
    if isinstance(record, LinkRate):
        return record.partition
    if isinstance(record, Owned):
        return f"{record.gpu}/{record.place}"
    if isinstance(record, Cordon):
        return record.gpu
    if isinstance(record, UnitRecord):
        return f"{record.unit.gpu}/{record.unit.place}"
    if isinstance(record, LayoutChange | KeptLayout):
        return "current"  # There is one at a time.
    return record.name


def _row(change: Put | Drop) -> tuple[str, str, bytes | None]:
    record = change.record
    value = msgspec.json.encode(record) if isinstance(change, Put) else None
    return _KINDS[type(record)], _key(record), value


def _checksum(kind: str, key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(f"{kind}\0{key}".encode()))


def _open(path: Path) -> tuple[sqlite3.Connection, Contents]:
    try:
        return _try_open(path)
    except (_Damaged, sqlite3.DatabaseError) as error:
        if isinstance(error, sqlite3.OperationalError) and not _looks_damaged(error):
            raise JournalFailed(f"cannot open the journal {path}: {error}") from error
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        warning = (
            f"the journal {path} was damaged ({error}) and was put aside as {aside.name}; "
            "models were found again in the repository and on the workers, and what was registered "
            "by call must be registered again"
        )
        log.error("%s", warning)
    try:
        database, _ = _try_open(path)
    except (_Damaged, sqlite3.Error) as error:
        raise JournalFailed(f"cannot create the journal {path}: {error}") from error
    return database, Contents(warning=warning)


def _looks_damaged(error: sqlite3.OperationalError) -> bool:
    # A file cut off or overwritten shows as one of these; a full or read-only disk does not.
    return any(word in str(error) for word in ("malformed", "not a database", "no such table"))


def _try_open(path: Path) -> tuple[sqlite3.Connection, Contents]:
    database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
        (found,) = database.execute("PRAGMA user_version").fetchone()
        if found > SCHEMA_VERSION:
            raise JournalFailed(
                f"the journal {path} was written by a newer hotbayd (schema {found}; this one "
                f"knows {SCHEMA_VERSION}): install that version, or give another --state-dir"
            )
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, key TEXT NOT NULL, "
                "value BLOB NOT NULL, checksum INTEGER NOT NULL, PRIMARY KEY (kind, key)) "
                "WITHOUT ROWID"
            )
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise _Damaged(verdict)
        return database, _read(database)
    except BaseException:
        database.close()
        raise


def _read(database: sqlite3.Connection) -> Contents:
    records: dict[str, list[Any]] = {kind: [] for kind in _TYPES}
    for kind, key, value, checksum in database.execute("SELECT * FROM records ORDER BY kind, key"):
        if checksum != _checksum(kind, key, value):
            raise _Damaged(f"the checksum of {kind} {key} does not match")
        try:
            records[kind].append(msgspec.json.decode(value, type=_TYPES[kind]))
        except (msgspec.MsgspecError, KeyError) as error:
            raise _Damaged(f"{kind} {key} cannot be read: {error}") from error
    return Contents(
        versions=tuple(records["version"]),
        labels=tuple(records["label"]),
        placements=tuple(records["placement"]),
        operations=tuple(sorted(records["operation"], key=lambda record: record.created_s)),
        links=tuple(records["link"]),
        owned=tuple(records["instance"]),
        layout_change=next(iter(records["layout"]), None),
        cordons=tuple(records["cordon"]),
        kept_layout=next(iter(records["kept layout"]), None),
        units=tuple(records["health"]),
    )
