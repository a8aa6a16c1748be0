"""Figures and words for people."""

from __future__ import annotations

import pytest

from daemon.gpuctl.output import Column, plain_table
from daemon.gpuctl.suggest import nearest
from daemon.gpuctl.text import (
    age,
    command_line,
    count,
    milliseconds,
    one_line,
    printable,
    rate,
    share,
    size,
    word,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"), (1, "1 B"), (999, "999 B"), (1000, "0.98 KiB"), (1024, "1.00 KiB"),
        (1536, "1.50 KiB"), (10 * 1024, "10.0 KiB"), (100 * 1024, "100 KiB"),
        (1024**2, "1.00 MiB"), (141 * 1024**3, "141 GiB"), (2**60, "1024 PiB"),
        (-2048, "-2.00 KiB"),
    ],
)  # fmt: skip
def test_sizes(value: int, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (61, "1 m 1 s"),
        (3600, "1 h 0 m"),
        (90061, "1 d 1 h"),
        (-5, "0 s"),
    ],
)
def test_ages(value: float, text: str) -> None:
    assert age(value) == text


def test_other_figures() -> None:
    assert [count(n) for n in (7, 28_300_000, 8_030_000_000)] == ["7", "28.3M", "8.0B"]
    assert [milliseconds(ms) for ms in (0.04, 12.34, 410.0)] == ["0.0 ms", "12.3 ms", "0.41 s"]
    assert rate(54.9e9) == "54.90 GB/s"
    assert [share(1, 4), share(0, 0)] == ["25%", "-"]
    assert word("MODEL_STATE_ACTIVE", "MODEL_STATE_") == "ACTIVE"
    assert word("MODEL_STATE_UNSPECIFIED", "MODEL_STATE_") == "-"


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b[2Jb\x07\x7f\x9bc\r") == r"a\x1b[2Jb\x07\x7f\x9bc\r"
    assert printable("\u202egnp.exe") == r"\u202egnp.exe"
    assert printable("tab\tline\nünï🙂") == "tab\tline\nünï🙂"
    assert one_line("a\n\n\tb") == "a b"


def test_commands_can_be_pasted() -> None:
    assert command_line("gpuctl", "load", "a b; rm -rf /") == "gpuctl load 'a b; rm -rf /'"


def test_the_nearest_name() -> None:
    assert nearest("proze", ["code", "prose"]) == "prose"
    assert nearest("xyzzy", ["code", "prose"]) is None
    assert nearest("prose", []) is None


def test_a_plain_table_is_aligned_and_has_no_trailing_blanks() -> None:
    columns = (Column("NAME"), Column("SIZE", right=True), Column("NOTE"))
    assert plain_table(columns, [["a", "10", ""], ["long", "5", "x"]]) == [
        "NAME  SIZE  NOTE",
        "a       10",
        "long     5  x",
    ]
