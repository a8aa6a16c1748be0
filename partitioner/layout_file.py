"""The layout file: what people write to say how GPUs are to be cut.

It owns the form of the file, its checks that need no GPU, and its writing. What a file means on the
GPUs that are there is `layout_resolve`'s. It touches nothing. The invariant: whatever is accepted
has one meaning, and whatever is refused names its line, the reason and what to change.

    version: 1
    found: ignore                  # or adopt: instances that are there already count as ours;
                                   # destroy: the same, once they are empty
    gpus:
      - product: NVIDIA H200       # or uuid, pci or index; more than one must all match
        partitions:
          - {profile: 3g.71gb, start: 4, owner: team-a}
          - memory: 30GiB          # by need: the smallest instance that has it
            sm: 16
            shares:
              - {memory: 12GiB, threads: 50, owner: team-b}
              - {memory: 12GiB, threads: 50, owner: team-c}
      - index: 1                   # no partitions: the whole GPU is one
        owner: team-d
      - index: 2
        shares:                    # each with multiprocessors to itself
          - {memory: 60GiB, sm: 96}
          - {memory: 60GiB, sm: 32}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, model_validator

from partitioner.geometry import Instance
from partitioner.layout import Found, GpuState, Share
from partitioner.strict_yaml import KeyPath, StrictModel, parse_located

MIB = 1 << 20
GIB = 1 << 30
MAX_GPU_ENTRIES = 64
MAX_PARTITIONS_PER_GPU = 16
MAX_SHARES = 48  # What one MPS server takes on every driver that has MPS limits.
# A CUDA context, before the first tensor: hundreds of MiB of kernels and local memory.
CONTEXT_BYTES = 512 * MIB

_SIZE = re.compile(r"(?P<number>[0-9]{1,7}(?:\.[0-9]{1,3})?) ?(?P<unit>MiB|GiB)")

Isolation = Literal["hardware", "process", "none"]


def parse_size(text: str) -> int:
    """Bytes of a size such as 30GiB or 512MiB; raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write for example 30GiB or 512MiB")
    size_bytes = int(float(match["number"]) * (GIB if match["unit"] == "GiB" else MIB))
    if size_bytes <= 0:
        raise ValueError("a size must be above 0")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The size as `parse_size` reads it, in whole MiB or GiB."""
    if size_bytes % GIB == 0:
        return f"{size_bytes // GIB}GiB"
    return f"{size_bytes // MIB}MiB"


def _check_size(text: str) -> str:
    parse_size(text)
    return text


Size = Annotated[str, AfterValidator(_check_size)]
Owner = Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$")]


class ShareEntry(StrictModel):
    """An MPS share."""

    memory: Size | None = None
    threads: Annotated[int, Field(ge=1, le=100)] | None = None
    sm: Annotated[int, Field(ge=1)] | None = None
    owner: Owner | None = None
    isolation: Isolation = "process"

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if self.isolation == "hardware":
            raise ValueError(
                "a share has walls between processes only: for isolation: hardware write it as a "
                "partition with a profile or a need"
            )
        if self.sm is not None and self.threads is not None:
            raise ValueError(
                "a share has multiprocessors to itself (sm) or a ceiling on the common ones "
                "(threads): take one of the two away"
            )
        limited = any(each is not None for each in (self.memory, self.threads, self.sm))
        if self.isolation == "none" and limited:
            raise ValueError(
                "isolation: none keeps no limits: take memory, threads and sm away, or write "
                "isolation: process"
            )
        if self.memory is not None and parse_size(self.memory) < CONTEXT_BYTES:
            raise ValueError(
                f"memory {self.memory} is below what one CUDA context takes: give the share at "
                f"least {format_size(CONTEXT_BYTES)}"
            )
        return self

    def share(self) -> Share:
        """The share as a value."""
        limit = None if self.memory is None else parse_size(self.memory)
        return Share(limit, self.threads, self.owner or "", self.sm)


Shares = Annotated[tuple[ShareEntry, ...], Field(max_length=MAX_SHARES)]


class PartitionEntry(StrictModel):
    """A GPU instance, by profile or by need."""

    profile: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    start: Annotated[int, Field(ge=0, lt=64)] | None = None
    memory: Size | None = None
    sm: Annotated[int, Field(ge=1)] | None = None
    owner: Owner | None = None
    isolation: Isolation = "hardware"
    shares: Shares = ()

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        by_need = self.memory is not None or self.sm is not None
        if (self.profile is not None) == by_need:
            raise ValueError("say either profile, or the need: memory, sm or both")
        if self.start is not None and self.profile is None:
            raise ValueError("start goes with profile: name the profile, or take start away")
        if self.isolation != "hardware":
            raise ValueError(
                f"isolation: {self.isolation} is for shares: a partition is a GPU instance, which "
                "has walls in hardware; write it under `shares`"
            )
        return self


class GpuEntry(StrictModel):
    """Which GPUs, and what they are cut into."""

    uuid: Annotated[str, Field(min_length=1)] | None = None
    pci: Annotated[str, Field(min_length=1)] | None = None
    index: Annotated[int, Field(ge=0)] | None = None
    product: Annotated[str, Field(min_length=1)] | None = None
    owner: Owner | None = None
    isolation: Isolation = "hardware"
    partitions: (
        Annotated[tuple[PartitionEntry, ...], Field(max_length=MAX_PARTITIONS_PER_GPU)] | None
    ) = None
    shares: Shares = ()

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if not self.selectors():
            raise ValueError("say which GPU: by uuid, pci, index or product")
        if self.partitions is not None and self.shares:
            raise ValueError("a GPU has partitions or shares: write shares under a partition")
        if self.isolation != "hardware":
            raise ValueError(
                f"isolation: {self.isolation} is for shares: write what shares the GPU under "
                "`shares`"
            )
        return self

    def selectors(self) -> dict[str, str | int]:
        """What the GPU is chosen by."""
        given = {"uuid": self.uuid, "pci": self.pci, "index": self.index, "product": self.product}
        return {key: value for key, value in given.items() if value is not None}


class LayoutFile(StrictModel):
    """The whole file."""

    version: Literal[1]
    found: Found = Found.IGNORE
    gpus: Annotated[tuple[GpuEntry, ...], Field(min_length=1, max_length=MAX_GPU_ENTRIES)]


def parse_layout(text: str, source: str) -> tuple[LayoutFile, Mapping[KeyPath, int]]:
    """Read a layout file and the line of each of its keys; raises `DocumentError`."""
    return parse_located(LayoutFile, text, source)


def export_layout(
    states: Iterable[GpuState],
    found: Found = Found.ADOPT,
    owners: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The present layout as a file of which a plan says that nothing is to be done.

    `owners` says whom partitions are for, by their names.
    """
    gpus = [_gpu_entry(state, owners) for state in sorted(states, key=lambda each: each.index)]
    document = {"version": 1, "found": found.value, "gpus": gpus}
    return yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=100)


def _gpu_entry(state: GpuState, owners: Mapping[str, str]) -> dict[str, Any]:
    def place(instance: Instance | None) -> dict[str, Any]:
        owner = owners.get(state.partition_id(instance), "")
        shares = _share_entries(state.shares.get(instance, ()))
        return ({"owner": owner} if owner else {}) | shares

    entry: dict[str, Any] = {"uuid": state.uuid}
    if not state.mig_enabled:
        return entry | place(None)
    entry["partitions"] = [
        {"profile": each.profile, "start": each.start} | place(each)
        for each in sorted(state.instances)
    ]
    return entry


def _share_entries(shares: tuple[Share, ...]) -> dict[str, Any]:
    if not shares:
        return {}
    entries = []
    for each in shares:
        entry: dict[str, Any] = {}
        if each.memory_bytes is not None:
            entry["memory"] = format_size(each.memory_bytes)
        if each.thread_percent is not None:
            entry["threads"] = each.thread_percent
        if each.sm_count is not None:
            entry["sm"] = each.sm_count
        if each.owner:
            entry["owner"] = each.owner
        entries.append(entry)
    return {"shares": entries}
