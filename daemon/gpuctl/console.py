"""Lines for people, on standard output and standard error.

The one place that writes free text. Nothing reaches a terminal that has not been made printable.
"""

from __future__ import annotations

import os
import sys

from daemon.gpuctl.text import printable


class OutputClosed(Exception):
    """Whoever read the output has left (`gpuctl ... | head`). Not an error: there is no more to do.

    It is no OSError, so that it is never taken for one of a connection.
    """


def print_line(text: str = "") -> None:
    """A line of the answer. Raises OutputClosed."""
    print_part(text + "\n")


def print_part(text: str) -> None:
    """A part of a line, at once: for text that arrives in pieces. Raises OutputClosed."""
    try:
        print(printable(text), end="", flush=True)
    except BrokenPipeError as error:
        raise OutputClosed from error


def leave_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """A line beside the answer: errors, hints."""
    print(printable(text), file=sys.stderr, flush=True)
