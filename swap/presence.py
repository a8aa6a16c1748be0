"""Making a segment's memory present, before anybody waits for it.

It owns the threads that touch a segment's pages, at the lowest priority the system has. It never
changes a byte, and never decides which segment is worth it. A page's first touch is what makes new
memory slow: the kernel finds it, clears it and, in a virtual machine, the host does so once more.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from swap.errors import BuildCancelled, InsufficientHostMemory, SwapError
from swap.segment import Segment

STEP_BYTES = 16 << 20
"""Touched between two looks at whether to go on."""
THREADS_MAX = 16


def make_present(
    segment: Segment, *, threads: int, huge_pages: bool, cancelled: threading.Event
) -> None:
    """Touch all of an unsealed segment.

    Raises BuildCancelled once `cancelled` is set, and InsufficientHostMemory when the host has no
    more memory, or the segment was cut meanwhile.
    """
    if segment.sealed:
        raise ValueError("a sealed segment's memory is what it is")
    step_bytes = max(STEP_BYTES, segment.page_bytes)
    steps = iter(range(0, segment.size_bytes, step_bytes))
    lock, failed = threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while not failed.is_set():
                with lock:
                    start = next(steps, None)
                if start is None:
                    return
                if cancelled.is_set():
                    raise BuildCancelled("touching memory was given up")
                count = min(step_bytes, segment.size_bytes - start)
                with segment.map_for_filling(
                    huge_pages=huge_pages, offset_bytes=start, size_bytes=count
                ) as mapping:
                    mapping.populate(0, count)
        except BaseException:
            failed.set()
            raise

    count = min(threads, THREADS_MAX)
    with ThreadPoolExecutor(count, thread_name_prefix="touch", initializer=_step_back) as pool:
        futures = [pool.submit(work) for _ in range(count)]
    for future in futures:
        try:
            future.result()
        except BuildCancelled:
            raise
        except SwapError as error:
            raise InsufficientHostMemory(
                f"{segment.size_bytes} bytes of memory cannot be made present: {error}",
                needed_bytes=segment.size_bytes,
            ) from error


def _step_back() -> None:
    """Have this thread run only where nobody else would."""
    with contextlib.suppress(OSError):  # a container may refuse
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
