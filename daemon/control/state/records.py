"""What the journal keeps, as frozen values: versions, labels, placements, operations.

These are the nouns of the control plane; every other module speaks in them. The module never
touches a database, a link or the API's messages. The invariant: a record says what was meant and
what was decided, never what a process or a GPU reports now.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from daemon.control.processes.holders import Holder
from engine.link.control import InFlight, Ledger
from partitioner.health import HealthState, Incident, Unit


class Failure(msgspec.Struct, frozen=True):
    """Why something failed: a reason of the catalogue, a sentence, and the figures in it."""

    reason: str
    message: str
    metadata: dict[str, str] = {}


class Facts(msgspec.Struct, frozen=True):
    """What inspecting a checkpoint told; see engine.link.build.Inspected."""

    family: str
    parameters: int
    vocabulary: int
    layers: int
    context_tokens: int
    checkpoint_bytes: int
    segment_bytes: int
    weights_bytes: int
    kv_bytes_per_token: int
    kv_fp8_bytes_per_token: int = 0
    kv_window_tokens: int = 0


class CanaryPrompt(msgspec.Struct, frozen=True):
    """A prompt that a version is tried with before it serves, and what it answered at first."""

    text: str
    prompt: tuple[int, ...]
    digest: str = ""
    """Of the image that `expected` is of."""
    expected: dict[str, tuple[int, ...]] = {}
    """Tokens by runtime, see engine.link.control.Canary."""


class Version(msgspec.Struct, frozen=True):
    """One version of a model. Without `facts` there is a `failure` that says why."""

    name: str
    version: int
    directory: str
    source: str
    """`repository` or `api`."""
    created_s: float
    fingerprint: str
    """Of the checkpoint's files and of how they are read; another one voids facts and digest."""
    facts: Facts | None = None
    failure: Failure | None = None
    digest: str = ""
    """Of its image, once one was built."""
    pinned: bool = False
    """Whether a user wants its image to stay in host memory."""
    canary: CanaryPrompt | None = None

    @property
    def key(self) -> str:
        return f"{self.name}@{self.version}"


class Label(msgspec.Struct, frozen=True):
    """A name that points to a version."""

    model: str
    label: str
    version: int


class Placement(msgspec.Struct, frozen=True):
    """That a model is meant to be on a partition; `drained` means by request, until resumed."""

    model: str
    partition: str
    drained: bool = False


class LinkRate(msgspec.Struct, frozen=True):
    """What copying to a partition's device was measured to reach, by calibrating."""

    partition: str
    bytes_per_s: float
    measured_s: float
    """When, in seconds of the epoch."""
    out_bytes_per_s: float = 0.0
    """The same for copying from the device; 0: not measured."""


class Cordon(msgspec.Struct, frozen=True):
    """That a GPU, by its UUID, takes no new models or swaps, by an operator's word."""

    gpu: str
    reason: str
    since_s: float


class UnitRecord(msgspec.Struct, frozen=True):
    """That a GPU or GPU instance is not healthy, and how far mending it has come."""

    unit: Unit
    state: HealthState
    incident: Incident
    since_s: float
    boot_id: str
    moved: tuple[str, ...] = ()
    """Models that were taken off it, to be brought back."""
    attempts: int = 0
    """Proofs that failed."""


class Stage(StrEnum):
    """Where an operation stands; the names of the API's OperationStage."""

    QUEUED = "QUEUED"
    PLANNING = "PLANNING"
    FETCHING = "FETCHING"
    BUILDING = "BUILDING"
    ATTACHING = "ATTACHING"
    DRAINING = "DRAINING"
    EVICTING = "EVICTING"
    COPYING = "COPYING"
    VERIFYING = "VERIFYING"
    CUTTING = "CUTTING"
    COMMITTED = "COMMITTED"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLED_BACK = "ROLLED_BACK"


class Kind(StrEnum):
    """What an operation does."""

    LOAD = "load"
    UNLOAD = "unload"
    SWAP = "swap"
    DRAIN = "drain"
    RESUME = "resume"
    REGISTER = "register"
    PIN = "pin"
    PULL = "pull"
    STAGE = "stage"
    CALIBRATE = "calibrate"
    LAYOUT = "layout"
    CORDON = "cordon"
    UNCORDON = "uncordon"


class Cause(StrEnum):
    """What brought an operation about."""

    API = "api"
    DEMAND = "demand"
    RECOVERY = "recovery"
    AHEAD = "ahead"


class Plan(msgspec.Struct, frozen=True):
    """What an operation is going to do, as foreseen."""

    partition: str = ""
    outgoing: tuple[str, ...] = ()
    incoming: str = ""
    copy_bytes: int = 0
    evict_bytes: int = 0
    build_bytes: int = 0
    host_evictions: tuple[str, ...] = ()
    device_bytes_needed: int = 0
    device_bytes_available: int = 0
    predicted_ms: float = 0.0
    staged_bytes: int = 0
    parked_bytes: int = 0
    """KV that has to leave the device for host memory, at most."""
    note: str = ""
    """For instance why a load stops at STANDBY."""


class Pulled(msgspec.Struct, frozen=True):
    """What of a hub is pulled; `commit` is what `revision` was when that was looked up."""

    repository: str
    revision: str
    commit: str = ""
    token_file: str = ""
    """Where the token is; the token itself is never journalled."""


class Intent(msgspec.Struct, frozen=True):
    """What was asked for, resolved to keys; enough to tell after a restart what was under way."""

    kind: Kind
    cause: Cause = Cause.API
    partition: str = ""
    outgoing: tuple[str, ...] = ()
    incoming: str = ""
    in_flight: InFlight = InFlight.DRAIN
    drain_timeout_s: float = 0.0
    standby: bool = False
    evict: bool = False
    pulled: Pulled | None = None
    queue: bool = False
    """Stand in line for what others change now, instead of being refused."""
    stage_bytes: int = 0
    """Of the weights to be staged, so many of the first; 0: all."""
    stage_layers: int = 0
    """The same, up to the end of this layer."""
    layout: str = ""
    """The id of the plan that is applied."""
    canary: str = ""
    """The text of a canary that is to be recorded anew; empty leaves what there is."""
    forget_canary: bool = False
    force: bool = False
    """End processes of others on what goes."""
    end_pids: tuple[int, ...] = ()
    """With `force`: only these; empty: whichever there are."""


class AppliedLayout(msgspec.Struct, frozen=True):
    """What applying a layout did, by the names of partitions and models."""

    created: tuple[str, ...] = ()
    destroyed: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    ended: tuple[Holder, ...] = ()
    phases_ms: dict[str, float] = {}


class KeptLayout(msgspec.Struct, frozen=True):
    """How the GPUs were last cut by us, as a layout file (or empty), and in which boot."""

    text: str
    boot_id: str
    owners: dict[str, str] = {}
    """Whom partitions are for, by their names."""


class Result(msgspec.Struct, frozen=True):
    """How an operation succeeded."""

    model: str
    state: str
    partition: str = ""
    message: str = ""
    ledger: Ledger | None = None
    links: tuple[LinkRate, ...] = ()
    """What calibrating measured."""
    layout: AppliedLayout | None = None


class Operation(msgspec.Struct, frozen=True):
    """A long-running call. It is done when it has a result or a failure."""

    name: str
    request_id: str
    method: str
    request_hash: str
    intent: Intent
    created_s: float
    stage: Stage = Stage.QUEUED
    plan: Plan = Plan()
    bytes_done: int = 0
    bytes_total: int = 0
    requests_left: int = 0
    message: str = ""
    ended_s: float = 0.0
    result: Result | None = None
    failure: Failure | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.failure is not None
