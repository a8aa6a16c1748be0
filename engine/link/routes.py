"""Messages between hotbayd and the gateway (`RUNTIME_DIR/gateway/control.sock`).

The gateway listens, hotbayd connects; a later connection replaces an earlier one. hotbayd always
sends the whole table of models, numbered; it is small, and so a gateway or a hotbayd that was away
needs no catching up. The gateway also keeps a descriptor of every image segment, which it never
maps: whoever else dies, the weights stay in memory.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

PROTOCOL = 1


class Disposition(StrEnum):
    """What the gateway does with a request for a model."""

    SERVE = "serve"  # send it to the worker of `partition`
    HOLD = "hold"  # keep it in the bounded queue and report the demand
    REFUSE = "refuse"  # answer 503 with `reason` at once: the model cannot be brought up


class Route(msgspec.Struct, frozen=True):
    """A model as the gateway sees it."""

    model: str
    """The key, `name@version`."""
    name: str
    version: int
    default: bool
    """Whether requests that give the name alone mean this version."""
    directory: str
    """The checkpoint's directory, from which the tokenizer and chat template are read."""
    context_tokens: int
    state: str
    disposition: Disposition
    partition: str = ""
    reason: str = ""
    created_s: int = 0
    """When it was registered, in seconds of the epoch."""


class WorkerAddress(msgspec.Struct, frozen=True):
    """Where a partition's worker takes requests; `generation` grows with each start."""

    partition: str
    tokens_socket: str
    generation: int


class GatewayLimits(msgspec.Struct, frozen=True):
    """What the gateway may be told to change while it runs."""

    hold_timeout_s: float
    held_requests_max: int


# hotbayd to gateway. Answered by Done or GatewayState or Failed; descriptors travel along.


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Who the gateway is and which segments it keeps. Answered by GatewayState."""

    call: int = 0


class SetTable(msgspec.Struct, frozen=True, tag=True):
    """Replace all routes. Answered by Done once in force; older versions are ignored."""

    version: int
    routes: tuple[Route, ...]
    workers: tuple[WorkerAddress, ...]
    limits: GatewayLimits
    call: int = 0


class KeepSegment(msgspec.Struct, frozen=True, tag=True):
    """Keep this segment's descriptor. Answered by Done. Idempotent by digest."""

    digest: str
    call: int = 0


class FetchSegment(msgspec.Struct, frozen=True, tag=True):
    """Hand back a kept segment's descriptor (a duplicate). Answered by Done with it, or Failed."""

    digest: str
    call: int = 0


class DropSegment(msgspec.Struct, frozen=True, tag=True):
    """Close a kept descriptor. Answered by Done."""

    digest: str
    call: int = 0


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Take no new requests, let open ones end for at most `drain_timeout_s`, then end."""

    drain_timeout_s: float = 0.0
    call: int = 0


# Gateway to hotbayd.


class GatewayState(msgspec.Struct, frozen=True, tag=True):
    """Answer to Describe."""

    call: int
    protocol: int
    pid: int
    boot_id: str
    generation: int
    table_version: int
    http: str
    grpc: str
    segments: tuple[str, ...] = ()


class ModelDemand(msgspec.Struct, frozen=True):
    """Requests of one model that are not being served because it is not ACTIVE."""

    model: str
    requests: int
    oldest_s: float
    """How long the oldest has been waiting, in seconds."""


class Demand(msgspec.Struct, frozen=True, tag=True):
    """All demand that waits, sent on change and at least once a second while there is any."""

    models: tuple[ModelDemand, ...]


class MetricsQuery(msgspec.Struct, frozen=True, tag=True):
    """Ask hotbayd for its metrics (its own and the workers'). Answered by Metrics."""

    call: int = 0


class Metrics(msgspec.Struct, frozen=True, tag=True):
    """Metrics in Prometheus' text format, from hotbayd."""

    call: int
    text: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """A call was carried out."""

    call: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A call was refused, and changed nothing."""

    call: int
    reason: str
    message: str


ToGateway = Describe | SetTable | KeepSegment | FetchSegment | DropSegment | Shutdown | Metrics
FromGateway = GatewayState | Demand | MetricsQuery | Done | Failed
