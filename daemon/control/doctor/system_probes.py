"""Probes of the rest: kernel, limits, service manager, disks and sockets.

It owns these judgements and touches the host through the subject alone. Every probe is a function
of its subject.
"""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from daemon.control.doctor.findings import Finding, Subject, missing, ok, warning
from daemon.control.doctor.host import read

# pidfds and close_range, without which processes cannot be held on to; and MADV_POPULATE_WRITE,
# without which memory is made present page by page.
KERNEL_MIN = (5, 9)
KERNEL_GOOD = (5, 14)
OPEN_FILES_MIN = 4096
DESCRIPTORS_MIN = 64
FREE_BYTES_MIN = 1 << 30
GIB = 1 << 30


def kernel(subject: Subject) -> Finding:
    """Whether the kernel has the calls that are used."""
    release = (read(subject.host, "/proc/sys/kernel/osrelease") or "").strip()
    told = re.match(r"(\d+)\.(\d+)", release)
    if told is None:
        return warning("its release cannot be read", "mount /proc")
    version = (int(told[1]), int(told[2]))
    newer = f"start a kernel of {KERNEL_GOOD[0]}.{KERNEL_GOOD[1]} or newer"
    if version < KERNEL_MIN:
        return missing(release, newer)
    return (
        ok(release)
        if version >= KERNEL_GOOD
        else warning(f"{release}: cold loads are slower", newer)
    )


def open_files(subject: Subject) -> Finding:
    """Whether there are descriptors for every client, image and worker."""
    limit = subject.host.limit(resource.RLIMIT_NOFILE)
    if limit is None or limit >= OPEN_FILES_MIN:
        return ok("not limited" if limit is None else str(limit))
    mend = "`LimitNOFILE=65536` in [Service] of hotbayd.service, or `ulimit -n 65536`"
    return warning(f"{limit}: so many clients, images and links at once", mend)


def descriptor_store(subject: Subject) -> Finding:
    """Whether weights stay in memory when hotbayd and the gateway both end."""
    kept = subject.host.descriptor_store()
    mend = "`FileDescriptorStoreMax=512` in [Service] of hotbayd.service"
    if kept is None:
        found = "no service manager: weights stay in memory as long as the gateway runs"
        return warning(found, f"run it as a service (systemd/hotbayd.service), with {mend}")
    if kept < 0:
        return ok("a service manager that does not tell how much it keeps (systemd before 254)")
    if kept < DESCRIPTORS_MIN:
        return warning(f"systemd keeps {kept} descriptors; each image takes one", mend)
    return ok(f"systemd keeps up to {kept} descriptors")


def state_disk(subject: Subject) -> Finding:
    """Whether the journal can be written."""
    return _room(subject, subject.config.state_dir, "journal and logs")


def image_cache(subject: Subject) -> Finding:
    """Whether images on disk can be read at the disk's rate, and have room."""
    cache = subject.config.image_cache
    if not cache.budget_bytes:
        return ok("off ([image_cache] budget_bytes = 0)")
    directory = Path(cache.directory)
    room = _room(subject, directory, f"up to {cache.budget_bytes / GIB:.1f} GiB of images")
    if room.mend:
        return room
    problem = subject.host.direct_io_problem(directory)
    if problem:
        return warning(
            f"{directory}: no O_DIRECT ({problem}): images go through the page cache",
            "set `directory` in [image_cache] to a local disk with ext4 or xfs",
        )
    return room


def sockets(subject: Subject) -> Finding:
    """Whether the runtime directory is this user's, on a file system of this host."""
    directory = subject.config.runtime_dir
    if directory.is_dir() and not os.access(directory, os.W_OK):
        return missing(f"{directory} cannot be written", "give another one with --runtime-dir")
    return ok(str(directory))


def _room(subject: Subject, directory: Path, use: str) -> Finding:
    free = subject.host.free_bytes(directory)
    found = f"{directory}: {free / GIB:.1f} GiB free, for {use}"
    if free < FREE_BYTES_MIN:
        return missing(found, f"make room on the disk of {directory}, or configure another one")
    return ok(found)
