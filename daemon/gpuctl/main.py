"""The program `gpuctl`.

It asks hotbayd and prints; it holds no logic beyond that. Exit codes are in `daemon.gpuctl.exits`.
"""

from __future__ import annotations

import io
import sys

from daemon.gpuctl.cli import build


def main() -> None:
    """Run the command line; ends the process with the command's exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character is shown its number, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    build()(prog_name="gpuctl")


if __name__ == "__main__":
    main()
