"""What a worker's process has on the GPU besides its pages, and whether that is within its reserve.

It owns the reading, through NVML, of what the driver counts for this process: the CUDA context, the
libraries' workspaces and what torch allocates, none of which the pool of pages accounts for. It
changes nothing. The invariant: what is not known is said to be unknown, never taken for nothing.
"""

from __future__ import annotations

import logging

import pynvml

log = logging.getLogger(__name__)


def process_bytes(pid: int) -> int | None:
    """Device memory that the driver counts for a process, on all GPUs and MIG instances together.

    None where NVML is absent, does not know the process (a container with process numbers of its
    own) or does not say how much it has.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        used = [
            process.usedGpuMemory
            for handle in handles
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid == pid
        ]
    except pynvml.NVMLError as error:
        log.warning("NVML does not tell what this process has on the GPU: %s", error)
        return None
    finally:
        pynvml.nvmlShutdown()
    return None if not used or None in used else sum(used)


def check_reserve(held_bytes: int | None, pages_bytes: int, reserve_bytes: int) -> int | None:
    """What of `held_bytes` is not pages, logged, and held against the reserve that is kept for it.

    A reserve that is too small is an error in the log, which names the figure to set: the worker
    serves on, but other partitions of the same GPU may find less memory than they were given.
    """
    if held_bytes is None:
        log.info("what CUDA takes besides the pages is not known; %d are reserved", reserve_bytes)
        return None
    beside = held_bytes - pages_bytes
    if beside > reserve_bytes:
        log.error(
            "CUDA takes %d bytes besides the partition's pages, and %d are reserved: set "
            "[worker] workspace_bytes to %d or more",
            beside,
            reserve_bytes,
            beside,
        )
    else:
        log.info("CUDA takes %d bytes besides the pages, of %d reserved", beside, reserve_bytes)
    return beside
