"""`hotbayd`: flags, the lock, the event loop, exit codes.

Exit codes: 0 after SIGTERM, SIGINT or SIGUSR2 (see `lifetime`), 1 when `--doctor` finds that
something is missing, 2 for a refused configuration, 3 when what is needed to start is missing, 4
when another daemon uses the directories.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvloop

from daemon.control.config_file import load
from daemon.control.config_text import as_toml
from daemon.control.errors import AlreadyRunning, ConfigInvalid, ControlError
from daemon.control.lock import DirectoryLock
from daemon.control.notify import Notifier
from engine.link.errors import LinkError
from partitioner.errors import PartitionerError
from partitioner.simulated.node import SimulatedNode

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
PRIORITY = -5
"""As `nice` counts; children are set back to 0."""
EXIT_CONFIG = 2
EXIT_START = 3
EXIT_LOCKED = 4
FLAGS = ("simulate", "repository", "state_dir", "runtime_dir", "http", "grpc")

log = logging.getLogger(__name__)


def version() -> str:
    """The installed distribution's version, or `0` in a bare checkout."""
    try:
        return importlib.metadata.version("hotbay")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; ends the process with code 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="hotbayd",
        description="Packs many models on few GPUs and swaps them.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration, TOML")
    parser.add_argument("--simulate", metavar="BOARD|FILE", help="such as h200x1, or a YAML file")
    parser.add_argument("--repository", metavar="DIR", help="models, as DIR/name/version/")
    parser.add_argument("--state-dir", metavar="DIR", help="the journal and logs")
    parser.add_argument("--runtime-dir", metavar="DIR", help="sockets")
    parser.add_argument("--http", metavar="HOST:PORT", help="the OpenAI API")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="inference over gRPC")
    parser.add_argument(
        "--print-config", action="store_true", help="print the configuration in force, and end"
    )
    parser.add_argument(
        "--doctor",
        nargs="?",
        const="table",
        choices=("table", "json"),
        help="say what this host lacks and what mends it, and end; code 1 if something is missing",
    )
    parser.add_argument("--version", action="version", version=f"hotbayd {version()}")
    return parser.parse_args(arguments)


@contextlib.contextmanager
def simulated(argument: str, runtime_dir: Path) -> Iterator[SimulatedNode | None]:
    """Let NVML be the simulated one where one is asked for, cut as it was left."""
    if not argument:
        yield None
        return
    from partitioner.simulated.install import installed
    from partitioner.simulated.remembered import FILE_NAME, remembering
    from partitioner.simulation import parse_simulate

    with installed(remembering(parse_simulate(argument), runtime_dir / FILE_NAME)) as node:
        yield node


def take_precedence() -> None:
    """Be scheduled before the workers where that is allowed.

    The daemon does little, and what it does, others wait for: above all its own restart while
    workers keep every core busy.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; the process's exit code."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO, stream=sys.stderr)
    take_precedence()
    # Children are executed at once and never use gRPC's state, so its handlers of forks are only in
    # the way; gRPC reads this when it is imported, which is why that comes afterwards.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from daemon.control.lifetime import serve

    try:
        config = load(parsed.config, {name: getattr(parsed, name) or "" for name in FLAGS})
        if parsed.print_config:
            print(as_toml(config), end="")
            return 0
        with contextlib.ExitStack() as stack:
            if parsed.doctor:
                from daemon.control.doctor.program import report

                stack.enter_context(simulated(config.node.simulate, config.runtime_dir))
                return report(config, Notifier(os.environ), as_json=parsed.doctor == "json")
            for directory in dict.fromkeys((config.state_dir, config.runtime_dir)):
                stack.callback(DirectoryLock.acquire(directory).release)
            node = stack.enter_context(simulated(config.node.simulate, config.runtime_dir))
            runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
            runner.run(serve(config, Notifier(os.environ), version(), node))
    except ConfigInvalid as error:
        log.error("%s", error)
        return EXIT_CONFIG
    except AlreadyRunning as error:
        log.error("%s", error)
        return EXIT_LOCKED
    except (ControlError, LinkError, PartitionerError) as error:
        log.error("cannot start: %s", error)
        return EXIT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
