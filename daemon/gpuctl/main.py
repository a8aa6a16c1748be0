"""The program `gpuctl`.

It asks hotbayd and prints; it holds no logic beyond that. Exit codes are in `daemon.gpuctl.exits`.
"""

from __future__ import annotations

from daemon.gpuctl.cli import build


def main() -> None:
    """Run the command line; ends the process with the command's exit code."""
    build()(prog_name="gpuctl")


if __name__ == "__main__":
    main()
