"""Tables for people and JSON for programs, both on standard output.

JSON is the protobuf JSON mapping of the API's message: lowerCamelCase names, 64-bit integers as
strings, enum values by name, and fields that are unset or zero written out, so that a program
always finds them. On a terminal, tables are drawn by rich from `Text`, never from markup: what a
server wrote is text. Elsewhere they are plain lines, neither wrapped nor cut.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from google.protobuf.json_format import MessageToDict, MessageToJson
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as error_details_pb2  # named by Any in errors
from hotbay.v1 import model_pb2 as model_pb2  # named by Any in operations
from hotbay.v1 import node_pb2 as node_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.text import one_line

STYLES = {
    "ACTIVE": "green",
    "READY": "green",
    "STAGED": "blue",
    "STANDBY": "cyan",
    "DRAINING": "yellow",
    "STARTING": "yellow",
    "COLD": "dim",
    "FAILED": "bold red",
}


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether its figures stand on the right."""

    heading: str
    right: bool = False


def print_json(message: Message) -> None:
    """One message, over several lines."""
    print(MessageToJson(message, always_print_fields_with_no_presence=True))


def print_json_line(message: Message) -> None:
    """One message on one line, at once: for streams."""
    text = MessageToJson(message, always_print_fields_with_no_presence=True, indent=None)
    print(text, flush=True)


def as_dict(message: Message) -> dict[str, object]:
    """A message as `json` takes it, for answers made of several messages."""
    fields: dict[str, object] = MessageToDict(message, always_print_fields_with_no_presence=True)
    return fields


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], empty: str) -> None:
    """A table without lines between, or the sentence `empty` when it has no rows."""
    if not rows:
        print_line(empty)
        return
    cells = [[one_line(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_for_a_terminal(columns, cells)
    else:
        for line in plain_table(columns, cells):
            print_line(line)


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as aligned lines of any width, for pipes and files."""
    lines = [[column.heading for column in columns], *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


def _print_for_a_terminal(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table folded to the terminal's width, with states in colour."""
    # Only a terminal has use for it, and it takes longer to load than most commands to answer.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(Text(column.heading), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(table)
