"""Tables for people and JSON for programs, both on standard output.

JSON is the protobuf JSON mapping of the API's message: lowerCamelCase names, 64-bit integers as
strings, enum values by name, and fields that are unset or zero written out, so that a program
always finds them. Tables are drawn by rich from `Text`, never from markup: what a server wrote is
text. When standard output is not a terminal, no line is wrapped or cut.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.json_format import MessageToDict, MessageToJson
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as error_details_pb2  # named by Any in errors
from hotbay.v1 import model_pb2 as model_pb2  # named by Any in operations
from hotbay.v1 import node_pb2 as node_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.text import one_line

# Wide enough for any table; rich pads nothing to it.
UNLIMITED_COLUMNS = 100_000

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
    # rich takes longer to load than most commands take to answer.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() else UNLIMITED_COLUMNS
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            Text(column.heading), justify="right" if column.right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(one_line(cell), style=STYLES.get(cell, "")) for cell in row))
    console.print(table)
