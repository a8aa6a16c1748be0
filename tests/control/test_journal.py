"""The journal on real files: durability, atomicity, damage."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.control.errors import JournalFailed
from daemon.control.state.journal import FILE_NAME, Contents, Drop, Journal, Put, Record
from daemon.control.state.records import (
    Failure,
    Intent,
    Kind,
    Label,
    Operation,
    Placement,
    Plan,
    Result,
    Stage,
    Version,
)
from engine.link.control import Ledger

VERSION = Version("prose", 3, "/models/prose/3", "api", 12.5, "abc", digest="d1")
OPERATION = Operation(
    name="operations/1",
    request_id="r1",
    method="LoadModel",
    request_hash="h",
    intent=Intent(Kind.LOAD, incoming="prose@3", outgoing=("code@1",)),
    created_s=100.0,
    stage=Stage.COMMITTED,
    plan=Plan(partition="gpu0", copy_bytes=7),
    result=Result("prose@3", "ACTIVE", "gpu0", ledger=Ledger(copy_ms=1.5)),
    ended_s=101.0,
)
RECORDS: tuple[Record, ...] = (
    VERSION,
    Label("prose", "production", 3),
    Placement("prose@3", "gpu0", drained=True),
    OPERATION,
)


async def contents(directory: Path) -> Contents:
    journal, found = await Journal.open(directory)
    await journal.close()
    return found


async def write(directory: Path, *changes: Put | Drop) -> None:
    journal, _ = await Journal.open(directory)
    await journal.commit(changes)
    await journal.close()


def test_what_is_committed_is_read_back_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        await write(tmp_path, *(Put(record) for record in RECORDS))
        found = await contents(tmp_path)
        assert (*found.versions, *found.labels, *found.placements, *found.operations) == RECORDS
        assert found.warning == ""
        failed = Version("prose", 3, "/x", "api", 1.0, "f", failure=Failure("INTERNAL", "no"))
        await write(tmp_path, Put(failed), Drop(RECORDS[2]))
        found = await contents(tmp_path)
        assert found.versions == (failed,)
        assert found.placements == ()

    asyncio.run(scenario())


def test_committed_changes_outlive_a_kill(tmp_path: Path) -> None:
    program = """
import asyncio, os, signal, sys
from pathlib import Path
from daemon.control.state.journal import Journal, Put
from daemon.control.state.records import Placement
async def main():
    journal, _ = await Journal.open(Path(sys.argv[1]))
    for number in range(20):
        await journal.commit([Put(Placement(f"m{number}@1", "gpu0"))])
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path.cwd())
    found = asyncio.run(contents(tmp_path))
    assert len(found.placements) == 20
    assert found.warning == ""


def test_it_is_really_synchronous_and_logged(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal, _ = await Journal.open(tmp_path)
        database = journal._database
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)
        await journal.close()

    asyncio.run(scenario())


def test_failing_transaction_changes_nothing_and_says_where(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal, _ = await Journal.open(tmp_path)
        # A full disk, as SQLite sees it: the file may not grow any more.
        pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
        journal._database.execute(f"PRAGMA max_page_count = {pages}")
        many = [Put(Placement(f"model-{number}@1", "gpu0")) for number in range(500)]
        with pytest.raises(JournalFailed, match=r"journal\.db.*full"):
            await journal.commit(many)
        journal._database.execute("PRAGMA max_page_count = 1000000")
        await journal.commit([Put(Placement("one@1", "gpu0"))])
        await journal.close()
        assert len((await contents(tmp_path)).placements) == 1
        with pytest.raises(JournalFailed, match="stopping"):
            await journal.commit([Put(Placement("two@1", "gpu0"))])

    asyncio.run(scenario())


def test_cancelled_caller_leaves_the_transaction_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal, _ = await Journal.open(tmp_path)
        task = asyncio.create_task(journal.commit([Put(record) for record in RECORDS]))
        await asyncio.sleep(0)
        task.cancel()
        await journal.commit([Put(Placement("later@1", "gpu0"))])
        await journal.close()
        found = await contents(tmp_path)
        assert len(found.placements) == 2
        assert len(found.operations) == 1

    asyncio.run(scenario())


def test_damaged_bytes_are_never_believed(tmp_path: Path) -> None:
    """Any byte may flip: the journal is then read right, or put aside whole."""
    random_ = random.Random(7)

    async def scenario() -> None:
        await write(tmp_path, *(Put(record) for record in RECORDS))
        path = tmp_path / FILE_NAME
        sound = path.read_bytes()
        aside = 0
        for _ in range(60):
            damaged = bytearray(sound)
            place = random_.randrange(len(sound))
            damaged[place] ^= 1 << random_.randrange(8)
            directory = tmp_path / f"copy{_}"
            directory.mkdir()
            (directory / FILE_NAME).write_bytes(damaged)
            found = await contents(directory)
            everything = (
                *found.versions,
                *found.labels,
                *found.placements,
                *found.operations,
            )
            if found.warning:
                aside += 1
                assert everything == ()
                assert any("damaged-" in name for name in os.listdir(directory))
                await write(directory, Put(VERSION))
                assert (await contents(directory)).versions == (VERSION,)
            else:
                assert everything == RECORDS
        assert aside > 0

    asyncio.run(scenario())


def test_journal_of_a_newer_daemon_is_left_alone(tmp_path: Path) -> None:
    asyncio.run(write(tmp_path, Put(VERSION)))
    database = sqlite3.connect(tmp_path / FILE_NAME)
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()
    with pytest.raises(JournalFailed, match="newer hotbayd"):
        asyncio.run(contents(tmp_path))
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalFailed, match=str(tmp_path / "absent")):
        asyncio.run(contents(tmp_path / "absent"))
