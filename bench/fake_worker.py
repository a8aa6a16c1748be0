"""A worker over a fake driver: `python -m bench.fake_worker --partition ID ...`, as the real one.

For dry runs of what is measured on a GPU: every call that would reach the driver is made, and its
rules are held to, while memory and arithmetic are the host's. Times mean nothing.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

from engine.worker.options import Options, parse_options
from engine.worker.process import serve
from swap.cuda_device import CudaDevice
from swap.device import DeviceMemory
from swap.fake_driver import FakeDriver


class ReadableCuda(CudaDevice):
    """Over a fake driver, whose memory is the host's: engines compute on it there."""

    kind: Literal["host", "cuda"] = "host"


def opened(options: Options) -> DeviceMemory:
    """Device memory over a fake driver."""
    return ReadableCuda(
        options.pool_bytes,
        page_bytes=options.page_bytes,
        driver=FakeDriver(),
        keep_mappings=options.keep_mappings,
    )


def main() -> int:
    """Run a worker until it is told to end."""
    return asyncio.run(serve(parse_options(sys.argv[1:]), opened))


if __name__ == "__main__":
    sys.exit(main())
