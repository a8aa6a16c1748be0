"""Which places are shared, as noted beside each one's control daemon.

It owns that note's form, its reading and writing. It asks no daemon. The invariants: the note is
there before its daemon is started and goes after it was stopped, so that no daemon of ours runs
unknown; one that is not `ready` says only that there may be one; after a reboot no note counts.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from partitioner.geometry import Instance
from partitioner.layout import Share, share_ids
from partitioner.mps.control import Language, Limits, MpsControl, limits_of
from partitioner.mps.static import VARIABLE

NOTE_NAME = "shares.json"


@dataclass(frozen=True)
class SharedPlace:
    """A GPU or GPU instance (`place`) under a control daemon, and what it is divided into.

    `name` is the place's as a partition, `device` the UUID that CUDA knows it by. `sm_partitions`
    is what clients of each share name its multiprocessors by, where they have some to themselves.
    `limited` is whether its daemon was told all limits since it started.
    """

    name: str
    gpu: str
    place: Instance | None
    device: str
    memory_bytes: int
    sm_count: int
    language: Language
    shares: tuple[Share, ...]
    boot_id: str
    ready: bool = False
    sm_partitions: tuple[str, ...] = ()
    limited: bool = True

    @property
    def static(self) -> bool:
        """Whether its shares have multiprocessors to themselves."""
        return any(each.sm_count for each in self.shares)

    @property
    def half_made(self) -> bool:
        """Whether its daemon lacks limits, or its shares the multiprocessors they are to have."""
        return not self.limited or (self.static and not self.sm_partitions)

    @property
    def partitions(self) -> tuple[str, ...]:
        """The names of its shares."""
        return share_ids(self.name, self.shares)

    @property
    def limits(self) -> tuple[Limits, ...]:
        """The limits of its shares, in order."""
        return tuple(limits_of(each, self.memory_bytes) for each in self.shares)

    def environment(self, control: MpsControl, number: int) -> dict[str, str]:
        """What a process must be started with to be a client of the share of that number."""
        variables = dict(control.environment(number, self.limits[number]))
        if self.sm_partitions:
            variables[VARIABLE] = self.sm_partitions[number]
        return variables

    def directory(self, root: Path) -> Path:
        """Where its daemon's directories are. Short, since the path of a socket is bounded.

        Two instances never start in the same slot, and the daemon of one goes before the other.
        """
        gpu = self.name.partition("/")[0]
        return root / (gpu if self.place is None else f"{gpu}@{self.place.start}")


def write(root: Path, shared: SharedPlace) -> None:
    """Note it, in place of an older note."""
    directory = shared.directory(root)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = directory / (NOTE_NAME + ".partial")
    partial.write_bytes(msgspec.json.encode(shared))
    partial.replace(directory / NOTE_NAME)


def remove(root: Path, shared: SharedPlace) -> None:
    """Forget it."""
    (shared.directory(root) / NOTE_NAME).unlink(missing_ok=True)


def read(root: Path, boot_id: str) -> tuple[SharedPlace, ...]:
    """Every note of this boot, in order of name; what cannot be read is none."""
    found = []
    for path in sorted(root.glob(f"*/{NOTE_NAME}")):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            shared = msgspec.json.decode(path.read_bytes(), type=SharedPlace)
            if shared.boot_id == boot_id:
                found.append(shared)
    return tuple(found)
