"""`python -m daemon.gateway.main`: arguments, logging, the event loop, exit codes.

Everything it prints goes to the log on standard error. Exit codes: 0 after being told to end, 2 for
wrong arguments, 3 for an address that is taken, 4 when another gateway runs in the directory.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import sys
from pathlib import Path

import uvloop

from daemon.gateway.config import GatewayConfig, read_config
from daemon.gateway.errors import ConfigInvalid, StartFailed
from daemon.gateway.gateway import Gateway
from daemon.gateway.listening import Address

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

log = logging.getLogger(__name__)


def parse_address(text: str) -> Address:
    """`HOST:PORT` or `[HOST]:PORT`. Raises ArgumentTypeError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT with a port of 0 to 65535")
    return Address(host.strip("[]"), int(port))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line. Ends the process with code 2 when it is wrong."""
    parser = argparse.ArgumentParser(prog="hotbay-gateway", description="Hotbay's data plane.")
    parser.add_argument("--runtime-dir", type=Path, required=True)
    parser.add_argument("--http", type=parse_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--grpc", type=parse_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--config-json", metavar="JSON|FILE")
    return parser.parse_args(arguments)


async def serve(arguments: argparse.Namespace, config: GatewayConfig) -> None:
    """Run a gateway until SIGTERM, SIGINT or hotbayd's Shutdown."""
    gateway = Gateway(arguments.runtime_dir, arguments.http, arguments.grpc, config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, gateway.stop)
    # What is alive now lives for good; sparing the collector it keeps its pauses short.
    gc.collect()
    gc.freeze()
    await gateway.run()


def main(arguments: list[str] | None = None) -> int:
    """Run; the process's exit code."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format=LOG_FORMAT, level=logging.INFO, stream=sys.stderr)
    try:
        config = read_config(parsed.config_json)
        try:
            logging.getLogger().setLevel(config.log_level.upper())
        except ValueError as error:
            raise ConfigInvalid(f"--config-json: log_level: {error}") from error
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(parsed, config))
    except StartFailed as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
