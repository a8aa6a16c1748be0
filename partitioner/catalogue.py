"""The catalogue of boards: what is publicly known about each GPU model that can be partitioned.

It owns `boards.yaml` and the values read from it. It never answers for a real GPU: on hardware the
geometry is read from NVML, because the same profile name means different things on different
boards and drivers. The catalogue feeds the simulated node, offline planning and comparisons with a
live board. The invariant: a board that loads is consistent (placements lie on its slot grid,
numbers and names are unique, no profile exceeds the board).
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from partitioner.errors import UnknownBoardError
from partitioner.strict_yaml import StrictModel, nearest, parse

NVIDIA_PCI_VENDOR_ID = 0x10DE
MAX_MEMORY_SLOTS = 64
MAX_MEMORY_MIB = 1 << 24

Confidence = Literal["high", "medium", "low"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0, le=64)]
MemoryMib = Annotated[int, Field(gt=0, le=MAX_MEMORY_MIB)]


class Placement(StrictModel):
    """A run of memory slots: where an instance may start and how many slots it takes."""

    start: Annotated[int, Field(ge=0)]
    size: Positive


class MigProfile(StrictModel):
    """One kind of GPU instance that a board offers.

    `enum` is the number asked of NVML, `id` the number NVML answers and wants for placements.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    enum: Annotated[int, Field(ge=0, le=255)]
    id: Annotated[int, Field(ge=0, le=255)]
    compute_slices: Positive
    max_instances: Positive
    memory_mib: MemoryMib
    sm_count: Positive
    copy_engines: Count
    decoders: Count
    encoders: Count = 0
    jpeg: Count = 0
    ofa: Count = 0
    slots: Positive
    starts: Annotated[tuple[int, ...], Field(min_length=1)]
    confidence: Confidence

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Every place on the slot grid that this profile may take."""
        return tuple(Placement(start=start, size=self.slots) for start in self.starts)


class Board(StrictModel):
    """One GPU model. Memory is in MiB as NVML reports it; `sm_count` is that of the whole GPU.

    `memory_gb_per_s` is the bandwidth that the vendor gives, 0 where it is not known.
    """

    product: Annotated[str, Field(min_length=1, max_length=95)]
    aliases: tuple[str, ...] = ()
    compute_capability: tuple[Positive, Annotated[int, Field(ge=0)]]
    sm_count: Positive
    memory_mib: MemoryMib
    reserved_mib: Annotated[int, Field(ge=0)]
    pci_device_ids: Annotated[tuple[int, ...], Field(min_length=1)]
    pcie_generation: Annotated[int, Field(ge=1, le=7)]
    pcie_lanes: Literal[1, 2, 4, 8, 16]
    memory_gb_per_s: Annotated[int, Field(ge=0, le=100_000)] = 0
    power_limit_w: Positive
    memory_slots: Annotated[int, Field(ge=0, le=MAX_MEMORY_SLOTS)] = 0
    compute_slices: Count = 0
    mig_toggle_needs_reset: bool = False
    min_driver: str = ""
    confidence: Confidence
    profiles: tuple[MigProfile, ...] = ()

    @property
    def mig_capable(self) -> bool:
        """Whether the board offers any GPU instance profile."""
        return bool(self.profiles)

    @field_validator("pci_device_ids")
    @classmethod
    def _ids_fit_16_bits(cls, ids: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 < number <= 0xFFFF for number in ids):
            raise ValueError("a PCI device id lies between 0x0001 and 0xffff")
        return ids

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.reserved_mib >= self.memory_mib:
            raise ValueError("reserved_mib leaves no memory")
        for field in ("name", "enum", "id"):
            values = [getattr(profile, field) for profile in self.profiles]
            if len(set(values)) != len(values):
                raise ValueError(f"two profiles share the same {field}")
        for profile in self.profiles:
            self._check_profile(profile)
        return self

    def _check_profile(self, profile: MigProfile) -> None:
        limits = {
            "compute_slices": self.compute_slices,
            "sm_count": self.sm_count,
            "memory_mib": self.memory_mib,
        }
        for field, limit in limits.items():
            if getattr(profile, field) > limit:
                raise ValueError(f"profile {profile.name}: {field} is above the board's {limit}")
        if min(profile.starts) < 0 or max(profile.starts) + profile.slots > self.memory_slots:
            raise ValueError(
                f"profile {profile.name}: a placement leaves the grid of "
                f"{self.memory_slots} memory slots"
            )
        if len(set(profile.starts)) != len(profile.starts):
            raise ValueError(f"profile {profile.name}: a start is given twice")


class _CatalogueFile(StrictModel):
    version: Literal[1]
    boards: Annotated[dict[str, Board], Field(min_length=1)]


@dataclass(frozen=True)
class Catalogue:
    """Boards by key. Keys and aliases are lower case and unique."""

    boards: Mapping[str, Board]

    def names(self) -> tuple[str, ...]:
        """Every key and alias, sorted."""
        aliases = [alias for board in self.boards.values() for alias in board.aliases]
        return tuple(sorted([*self.boards, *aliases]))

    def resolve(self, name: str) -> str:
        """Return the key of the board called `name` (a key or an alias, in any case)."""
        wanted = name.lower()
        for key, board in self.boards.items():
            if wanted == key or wanted in board.aliases:
                return key
        raise UnknownBoardError(
            f"no board is called {name!r}{nearest(wanted, self.names())}; "
            f"known boards: {', '.join(self.names())}"
        )

    def board(self, name: str) -> Board:
        """Return the board called `name`; raises `UnknownBoardError` with the nearest name."""
        return self.boards[self.resolve(name)]

    def by_pci_device_id(self, device_id: int) -> Board | None:
        """Return the board with this 16-bit PCI device id, if the catalogue has it."""
        for board in self.boards.values():
            if device_id in board.pci_device_ids:
                return board
        return None

    def with_boards(self, extra: Mapping[str, Board]) -> Catalogue:
        """Return a catalogue in which `extra` is added to, and goes before, what is here."""
        kept = {key: board for key, board in self.boards.items() if key not in extra}
        return Catalogue({**extra, **kept})


def load_catalogue() -> Catalogue:
    """Read the catalogue that ships with the package; raises `DocumentError` where it is broken."""
    resource = importlib.resources.files("partitioner").joinpath("boards.yaml")
    return parse_catalogue(resource.read_text("utf-8"), "partitioner/boards.yaml")


def parse_catalogue(text: str, source: str) -> Catalogue:
    """Validate the text of a catalogue; `source` names it in messages."""
    return Catalogue(parse(_CatalogueFile, text, source).boards)
