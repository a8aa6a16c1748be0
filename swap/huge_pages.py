"""The pages segments are made of: which the host has, and which a segment of some size should take.

It owns reading the host's pools of huge pages and its rule for transparent ones, and the choice;
it never takes a page and never changes a setting of the host. Pages of 1 GiB and 2 MiB come from
pools that an administrator filled (`hugetlb`); where none has enough, the kernel may give
transparent huge pages, if its `shmem_enabled` lets it. Invariant: a choice is a hint. Pools are
shared with others, so whoever takes pages must be ready to be refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

POOLS = Path("/sys/kernel/mm/hugepages")
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
SMALL_PAGE_BYTES = 4096
POOL_PAGE_BYTES = (1 << 30, 2 << 20)
LOST_SHARE_MAX = 1 / 16
"""Of a segment, for rounding it up to whole huge pages."""

Setting = Literal["auto", "transparent", "off"]


def free_bytes(page_bytes: int, pools: Path = POOLS) -> int:
    """What a pool of the host can give now; 0 where there is none."""
    free = _pages(page_bytes, "free_hugepages", pools)
    return max(0, free - _pages(page_bytes, "resv_hugepages", pools)) * page_bytes


def page_bytes_for(size_bytes: int, setting: Setting, pools: Path = POOLS) -> int:
    """The largest pages that a segment can have without much loss; else SMALL_PAGE_BYTES."""
    if setting == "auto":
        for page_bytes in POOL_PAGE_BYTES:
            rounded = round_up(size_bytes, page_bytes)
            if _loses_little(size_bytes, rounded) and rounded <= free_bytes(page_bytes, pools):
                return page_bytes
    return SMALL_PAGE_BYTES


def largest_bytes(size_bytes: int, setting: Setting, pools: Path = POOLS) -> int:
    """The most that a segment of this size can take, whichever pages it gets."""
    sizes = [size_bytes]
    for page_bytes in POOL_PAGE_BYTES if setting == "auto" else ():
        rounded = round_up(size_bytes, page_bytes)
        if _pages(page_bytes, "nr_hugepages", pools) and _loses_little(size_bytes, rounded):
            sizes.append(rounded)
    return max(sizes)


def transparent_rule(path: Path = TRANSPARENT) -> str:
    """When the kernel gives segments transparent huge pages: `advise`, `never`, ...; or ""."""
    try:
        words = path.read_text().split()
    except OSError:
        return ""
    return next((word.strip("[]") for word in words if word.startswith("[")), "")


def describe(setting: Setting, pools: Path = POOLS, transparent: Path = TRANSPARENT) -> str:
    """For people: what new segments are made of."""
    kinds = []
    for page_bytes, name in zip(POOL_PAGE_BYTES, ("1 GiB", "2 MiB"), strict=True):
        free = free_bytes(page_bytes, pools) // page_bytes
        if setting == "auto" and free:
            kinds.append(f"{free} free huge pages of {name}")
    rule = transparent_rule(transparent)
    if setting != "off" and rule in ("advise", "always", "force", "within_size"):
        kinds.append("transparent huge pages")
    return ", then ".join([*kinds, "4 KiB pages"])


def _loses_little(size_bytes: int, rounded_bytes: int) -> bool:
    return rounded_bytes - size_bytes <= LOST_SHARE_MAX * size_bytes


def _pages(page_bytes: int, counter: str, pools: Path) -> int:
    try:
        return int((pools / f"hugepages-{page_bytes >> 10}kB" / counter).read_text())
    except (OSError, ValueError):
        return 0


def round_up(size_bytes: int, page_bytes: int) -> int:
    """The bytes of whole pages that hold `size_bytes`."""
    return -(-size_bytes // page_bytes) * page_bytes
