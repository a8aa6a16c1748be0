"""A tiny CUDA client that tells what it gets, from inside a share of a GPU.

    python -m swap.share_probe --limit-bytes N [--multiprocessors N] [--memory-bytes N]

It makes a context, counts the multiprocessors that it may use, asks for more memory than its limit,
which must be refused, tells both as one line of JSON, and keeps its context until its standard
input ends. It computes nothing and holds no memory. The invariant: what it tells is what the driver
did, never what the environment promised. The two other arguments are the place's, and are ignored:
those who stand in for a driver need them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from swap.cuda_driver import OUT_OF_MEMORY, CudaDriver, Driver, DriverError
from swap.errors import SwapError

EXIT_REFUSED = 1
MARGIN_BYTES = 64 << 20
"""More than limits are rounded by."""


def see(driver: Driver, limit_bytes: int, hold: Callable[[str], None]) -> None:
    """Look, give what was seen to `hold`, and let go. Raises DeviceError where CUDA refuses."""
    driver.init()
    gpu = driver.device_get(0)
    context = driver.primary_context_retain(gpu)
    try:
        driver.context_set_current(context)
        seen = {
            "multiprocessors": driver.multiprocessors(gpu),
            "memory_bytes": _allocatable(driver, gpu, limit_bytes),
        }
        hold(json.dumps(seen))
    finally:
        driver.primary_context_release(gpu)


def _allocatable(driver: Driver, gpu: int, limit_bytes: int) -> int:
    """The limit, if one allocation above it is refused; else how much was given."""
    granularity = driver.granularity(gpu)
    over_bytes = -(-(limit_bytes + MARGIN_BYTES) // granularity) * granularity
    try:
        handle = driver.mem_create(over_bytes, gpu)
    except DriverError as error:
        if error.code != OUT_OF_MEMORY:
            raise
        return limit_bytes
    driver.mem_release(handle)
    return over_bytes


def main(arguments: list[str]) -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(prog="hotbay-share-probe", allow_abbrev=False)
    for name in ("--limit-bytes", "--multiprocessors", "--memory-bytes"):
        parser.add_argument(name, type=int, default=0)
    limit_bytes = parser.parse_args(arguments).limit_bytes

    def hold(seen: str) -> None:
        print(seen, flush=True)
        sys.stdin.buffer.read()

    try:
        see(CudaDriver(), limit_bytes, hold)
    except SwapError as error:
        print(error, flush=True)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
