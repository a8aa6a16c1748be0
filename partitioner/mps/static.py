"""Static SM partitions: multiprocessors of a GPU that belong to one share and to no other.

It owns what is known of them beforehand (in which chunks each architecture gives them out, and
from which control program on), and their words in the legacy protocol. It runs no program. The
invariants: a daemon has them from its start (`-S`) or never, and then no client comes in without
one; they are made while a GPU has no client; what was asked for counts only when it is listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from partitioner.errors import MpsAnswerError, MpsLimitError

START_FLAG = "-S"
VARIABLE = "CUDA_MPS_SM_PARTITION"
FIRST_VERSION = 13010
"""What `nvidia-cuda-mps-control -v` tells at least, of the first driver that has them."""
FIRST_DRIVER = 590
LIST_COMMAND = "lspart"

# By compute capability, from the newest on; older GPUs have none.
_CHUNKS = (((9, 0), 8), ((8, 0), 4))
_VERSION = re.compile(r"\b(\d{5,6})\b")
_COLUMNS = 7
_PARTITION, _USED_SM = 1, 5


@dataclass(frozen=True)
class Listed:
    """A partition as a daemon lists it. The name may be cut short."""

    name: str
    sm_count: int


def chunk_of(compute_capability: tuple[int, int]) -> int:
    """How many multiprocessors are given out together; 0 where none are."""
    return next((count for first, count in _CHUNKS if compute_capability >= first), 0)


def version_of(told: str) -> int:
    """The version in the program's answer to `-v`; 0 without one."""
    match = _VERSION.search(told)
    return int(match[1]) if match else 0


def add_command(device: str, chunks: int) -> str:
    """What makes a partition of so many chunks."""
    return f"sm_partition add {device} {chunks}"


def remove_command(name: str) -> str:
    """What takes the partition of that name away."""
    return f"sm_partition rm {name.replace('/', ' ', 1)}"


def parse_added(told: str, device: str) -> str:
    """What a client names the new partition by. Raises `MpsLimitError` where there is none."""
    match = re.search(rf"{re.escape(device)}/(\S+)", told)
    if match is None:
        raise MpsLimitError(
            f"MPS control gives no partition of multiprocessors of {device}: "
            f"{told.strip() or 'it said nothing'}; ask for less, or for `threads` in place of `sm`"
        )
    return f"{device}/{match[1]}"


def parse_listed(told: str) -> tuple[Listed, ...]:
    """Every partition of the table that a daemon shows; lines that are no rows are passed over."""
    rows = [line.split() for line in told.splitlines()]
    try:
        return tuple(
            Listed(row[_PARTITION].rstrip("."), int(row[_USED_SM]))
            for row in rows
            if len(row) == _COLUMNS and row[0].startswith("GPU-") and row[_PARTITION] != "-"
        )
    except ValueError:
        raise MpsAnswerError(f"MPS control lists partitions as {told!r}") from None


def sm_count_of(name: str, listed: tuple[Listed, ...]) -> int:
    """The multiprocessors of a partition according to the list; 0 where it is not there."""
    own = name.partition("/")[2]
    found = (each.sm_count for each in listed if each.name and own.startswith(each.name))
    return next(found, 0)
