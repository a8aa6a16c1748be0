"""The worker's program: `python -m engine.worker.main --partition ID --runtime-dir DIR ...`.

Owns the process's settings: its arguments, session, logging, its GPU and how torch's threads wait.
It takes everything from its arguments. Invariant: the worker outlives whoever started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys

from engine.worker.errors import WorkerError
from engine.worker.options import parse_options
from swap.errors import SwapError

EXIT_REFUSED = 2
SPIN_COUNT = 5000
"""How often one of torch's threads looks for the others before it sleeps. OpenMP's own choice is so
large that on a machine where anything else runs a small step takes 20 times as long; with this it
takes 4 times as long there, as with immediate sleep, and where nothing else runs no longer at all,
which with immediate sleep is 1.6 times as long."""

COPIED_PAST_CACHES = "glibc.cpu.x86_non_temporal_threshold"
COPIED_PAST_CACHES_BYTES = 1 << 20
"""From how many bytes on a copy of the host device goes past the processor's caches, as a copy over
a link does. By itself glibc does so from three quarters of the shared cache on, which on some
processors no piece of an image reaches: in pieces of 64 MiB a GiB then takes 155 ms in place of 91
(Xeon with 480 MiB of shared cache). From 16 times as many on it copies four pages side by side,
which takes another 5 ms off. Other C libraries do not know the setting."""

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run a worker until it is told to end. Returns the process's exit status."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        if arguments is None and options.device == "host":
            _copy_past_caches()
        _leave_session()
        # These must be there before torch is loaded, hence the late import.
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        if options.gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = options.gpu
        from engine.worker.process import serve

        return asyncio.run(serve(options))
    except (WorkerError, SwapError) as error:
        log.error("the worker does not start: %s", error)
        return EXIT_REFUSED


def _copy_past_caches() -> None:
    """Have the C library told, which listens at a program's start alone: start this one again."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if COPIED_PAST_CACHES not in tunables:
        told = f"{COPIED_PAST_CACHES}={COPIED_PAST_CACHES_BYTES:#x}"
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{told}" if tunables else told
        os.execv(sys.executable, sys.orig_argv)


def _leave_session() -> None:
    """Leave the session of whoever started it, so that neither its end nor a terminal's is ours."""
    with contextlib.suppress(PermissionError):  # it leads a group of its own already
        os.setsid()


if __name__ == "__main__":
    sys.exit(main())
