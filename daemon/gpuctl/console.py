"""Lines for people, on standard output and standard error.

The one place that writes free text. Nothing reaches a terminal that has not been made printable.
"""

from __future__ import annotations

import sys

from daemon.gpuctl.text import printable


def print_line(text: str = "") -> None:
    """A line of the answer."""
    print(printable(text), flush=True)


def print_part(text: str) -> None:
    """A part of a line, at once: for text that arrives in pieces."""
    print(printable(text), end="", flush=True)


def complain(text: str) -> None:
    """A line beside the answer: errors, hints."""
    print(printable(text), file=sys.stderr, flush=True)
