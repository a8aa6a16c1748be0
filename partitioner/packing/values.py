"""The words of packing: what a model needs, a GPU to be filled, a room on it, and what comes out.

It owns values and nothing else. A room is a whole GPU or an instance of one profile; it has one
worker, or several as MPS shares. The invariant: a value never changes, so that what was decided on
it can be decided again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from partitioner.geometry import Instance
from partitioner.layout import GpuState


class Isolation(IntEnum):
    """The least wall between a model and those of other tenants; models of one tenant need none."""

    NONE = 0  # One worker serves both.
    PROCESS = 1  # A worker, and so an MPS share, of its own.
    HARDWARE = 2  # A GPU instance or GPU of its own.


@dataclass(frozen=True)
class ModelNeed:
    """One model to be placed; 0 for what is not asked or not known.

    `requests` run at once; together they want `tokens_per_s`, each token within `ms_per_token`.
    `alone_ms` is the time per token that was measured with a whole GPU to itself.
    """

    name: str
    weights_bytes: int
    kv_bytes: int
    tenant: str = ""
    isolation: Isolation = Isolation.PROCESS
    value: float = 1.0
    requests: int = 1
    tokens_per_s: float = 0.0
    ms_per_token: float = 0.0
    alone_ms: float = 0.0
    line: int = 0


@dataclass(frozen=True)
class Room:
    """A whole GPU (empty `profile`) or an instance of a profile.

    `slowdown` is how much longer a token may take than on the whole GPU: decoding waits for memory
    and computes, and a part of a GPU has its part of both. `bytes_per_s` is the whole GPU's memory
    bandwidth, 0 where it is not known.
    """

    profile: str
    memory_bytes: int
    slots: int
    slowdown: float = 1.0
    bytes_per_s: float = 0.0


@dataclass(frozen=True)
class Bin:
    """A GPU to be filled: as it is cut, and what it is besides."""

    state: GpuState
    sm_count: int
    bytes_per_s: float = 0.0

    @property
    def may_be_whole(self) -> bool:
        """Whether it can serve uncut without a reset, and without anybody losing an instance."""
        state = self.state
        if state.foreign:
            return False
        return not (state.mig_enabled and state.mig_toggle_needs_reset)

    @property
    def may_be_cut(self) -> bool:
        """Whether it can be cut into instances without a reset."""
        state = self.state
        if not state.geometry.profiles:
            return False
        return state.mig_enabled or not state.mig_toggle_needs_reset


@dataclass(frozen=True)
class Worker:
    """One worker of a room: indices of its models, and the memory it is given."""

    models: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True)
class Arrangement:
    """How a group of models sits in a room: one worker, or MPS shares. Times go with `models`."""

    models: tuple[int, ...]
    workers: tuple[Worker, ...]
    used_bytes: int
    ms_per_token: tuple[float, ...]

    @property
    def shared(self) -> bool:
        """Whether the room is divided into MPS shares."""
        return len(self.workers) > 1


@dataclass(frozen=True)
class Refusal:
    """Why a group does not fit into a room, and by how much.

    `kind` is memory, isolation, time, rate, unknown (nothing tells the time per token) or shares.
    `model` is the index of the one that it is about, `have` what there would be and `want` what
    must be: bytes, milliseconds or tokens per second.
    """

    kind: str
    model: int
    want: float = 0.0
    have: float = 0.0


@dataclass(frozen=True)
class Filled:
    """What one GPU is used for: arrangements by instance, by None for the whole GPU."""

    bin: Bin
    rooms: tuple[tuple[Instance | None, Arrangement], ...]

    @property
    def models(self) -> tuple[int, ...]:
        """The models that are here."""
        return tuple(index for _, each in self.rooms for index in each.models)


@dataclass(frozen=True)
class LeftOut:
    """A model without a place: why, and the nearest change that gives it one."""

    model: int
    reason: str
    remedy: str


@dataclass(frozen=True)
class Packing:
    """The whole: GPUs that are used, in order of their index, and what was left out."""

    filled: tuple[Filled, ...]
    left_out: tuple[int, ...]
    value: float
