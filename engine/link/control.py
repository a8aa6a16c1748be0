"""Messages between hotbayd and a worker (`RUNTIME_DIR/workers/<partition>/control.sock`).

The worker listens; hotbayd connects, asks `Describe`, and adopts what it finds. A later connection
replaces an earlier one, so that a restarted hotbayd never waits for a dead one. A worker carries
out one exchange at a time and ends it whether or not hotbayd is still there: `WorkerState` then
tells how it ended. Models are named by key, `name@version`; images by digest.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

PROTOCOL = 1
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0
"""Range of a model's weight beside others."""


class InFlight(StrEnum):
    """What an exchange does with the outgoing model's running requests."""

    DRAIN = "drain"  # finish them; what still runs at drain_timeout_s is treated as PRESERVE
    PRESERVE = "preserve"  # pause now, keep their KV, go on with it when the model is back
    RECOMPUTE = "recompute"  # pause now, drop their KV, prefill again when the model is back
    ABORT = "abort"  # end them with an error


class EngineStatus(StrEnum):
    """Where a model stands on this worker; the words of the project's table of states."""

    STANDBY = "STANDBY"
    STAGED = "STAGED"
    ACTIVE = "ACTIVE"
    DRAINING = "DRAINING"
    FAILED = "FAILED"


class Stage(StrEnum):
    """The stages of an exchange, in order; ROLLING_BACK follows a failure at any of them."""

    PLANNING = "PLANNING"
    DRAINING = "DRAINING"
    EVICTING = "EVICTING"
    COPYING = "COPYING"
    VERIFYING = "VERIFYING"
    COMMITTED = "COMMITTED"
    ROLLING_BACK = "ROLLING_BACK"


class EngineSpec(msgspec.Struct, frozen=True, tag=True):
    """The model an exchange brings in. The image `digest` must have been attached before."""

    model: str
    digest: str
    context_tokens: int
    """Longest prompt plus output of one request; KV for one such request is guaranteed."""
    running_requests_max: int
    waiting_requests_max: int
    weight: float = 1.0
    """Its share of the worker's time beside other models that have work at once."""
    kv_dtype: Literal["auto", "fp8"] = "auto"
    """What its keys and values are stored as: as they are computed, or as FP8."""


CANARY_PROMPT_TOKENS_MAX = 64
CANARY_TOKENS = 16
"""How many tokens a canary draws: each costs a step, which held requests wait for."""


class Canary(msgspec.Struct, frozen=True):
    """A prompt whose greedy tokens tell whether a model is what it was."""

    prompt: tuple[int, ...]
    """At most CANARY_PROMPT_TOKENS_MAX."""
    expected: dict[str, tuple[int, ...]] = {}
    """By runtime, see `engine.canary.runtime_of`. What it has no entry for is recorded."""


class CanaryRecord(msgspec.Struct, frozen=True):
    """What a canary drew where it had not been tried before."""

    runtime: str
    tokens: tuple[int, ...]


class Ledger(msgspec.Struct, frozen=True):
    """What an exchange did, as measured by the worker. Milliseconds are of its monotonic clock."""

    drain_ms: float = 0.0
    evict_ms: float = 0.0
    park_ms: float = 0.0
    """Copying KV out to make room, beside the copy of the weights."""
    unpark_ms: float = 0.0
    """Copying the incoming model's parked KV back."""
    link_wait_ms: float = 0.0
    """Waiting for other workers' copies over the same link; not part of copy_ms."""
    copy_ms: float = 0.0
    verify_ms: float = 0.0
    canary_ms: float = 0.0
    total_ms: float = 0.0
    first_token_ms: float | None = None
    """From the exchange's arrival to the incoming model's first token, when one was waiting."""
    copied_bytes: int = 0
    staged_bytes: int = 0
    """Of the incoming model's weights, what was on the device before."""
    evicted_bytes: int = 0
    link_bytes_per_s: float = 0.0
    """The measured limit of this partition's link, or the throttle where one is set."""
    link_missed: bool = False
    """The copy did not get its turn at the link in time, and shared it with others."""
    pageable_bytes: int = 0
    """Of the image, what could not be pinned and was copied slowly for that."""
    requests_finished: int = 0
    """Running requests of the outgoing model that were finished while draining."""
    requests_kept: int = 0
    """Requests of the outgoing model that wait here for its return."""
    requests_preserved: int = 0
    """Of the kept ones, those with their KV kept too; the others compute theirs again."""
    parked_bytes: int = 0
    """KV that was copied out to make room."""
    residue_bytes: int = 0
    """Pages that the outgoing models still hold at the commit: staged weights and kept KV."""
    requests_lost: int = 0


class EngineState(msgspec.Struct, frozen=True):
    """One model on this worker."""

    model: str
    digest: str
    status: EngineStatus
    weights_bytes: int = 0
    kv_used_bytes: int = 0
    kv_bytes: int = 0
    """KV pages in use or promised; what is mapped ahead of need counts as free."""
    running: int = 0
    waiting: int = 0
    """All that wait, those with their KV kept included."""
    paused: int = 0
    """Of those that wait, the ones whose KV stayed on the device."""
    parked: int = 0
    """Of those that wait, the ones whose KV is in host memory."""
    parked_bytes: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    computed_tokens_total: int = 0
    """Tokens that went through the model, those that were computed again counted again."""
    preemptions_total: int = 0
    """Requests that gave way to others for want of KV memory."""
    preemptions_parked_total: int = 0
    """Of those, for how many KV was parked; the others compute it again."""
    graphs: int = 0
    """Batches of decodes that are captured now."""
    graph_bytes: int = 0
    """Memory that these brought to the worker's pool of graphs, beside its pages."""
    graph_replays_total: int = 0
    graph_capture_seconds_total: float = 0.0
    """Time spent on capturing, which a step waits for."""
    cached_bytes: int = 0
    """Cached prefixes, in KV blocks that no request uses: most of it counts as free."""
    prefix_lookup_tokens_total: int = 0
    """Prompt tokens that were looked for in the prefix cache."""
    prefix_hit_tokens_total: int = 0
    """Of those, what was found there."""
    reason: str = ""
    """Why the status is FAILED."""
    spare: bool = False
    """Its weights are there, or on their way, only for as long as nobody needs their pages."""
    staged_bytes: int = 0
    """Of a spare model's weights, the first ones that are there."""
    copy_bytes: int = 0
    """What a spare model's coming in would copy."""


class ExchangeResult(msgspec.Struct, frozen=True):
    """How an exchange ended. `error` is empty when it was committed."""

    operation: str
    incoming: str
    outgoing: str
    error_reason: str = ""
    error: str = ""
    rolled_back: bool = False
    ledger: Ledger = Ledger()
    canary: CanaryRecord | None = None
    """Set when one was recorded."""


# hotbayd to worker. Each is answered by the reply named in its docstring, or by Failed.


class Describe(msgspec.Struct, frozen=True, tag=True):
    """Who and what the worker is. Answered by WorkerState."""

    call: int = 0


class AttachImage(msgspec.Struct, frozen=True, tag=True):
    """Map an image's segment, whose descriptor travels along, so that it can be copied from.

    Answered by Done once it is mapped and registered. Idempotent.
    """

    digest: str
    call: int = 0


class DetachImage(msgspec.Struct, frozen=True, tag=True):
    """Forget an image; refused while an engine on the device was made from it. Answered by Done."""

    digest: str
    call: int = 0


class Exchange(msgspec.Struct, frozen=True, tag=True):
    """Take `outgoing` models off the device and put `incoming` on it, or leave all as it was.

    Answered by Exchanged; StageReached events come meanwhile. A load has no outgoing, an unload no
    incoming. Either everything is done or the outgoing models serve again.
    """

    operation: str
    outgoing: tuple[str, ...] = ()
    incoming: EngineSpec | None = None
    in_flight: InFlight = InFlight.DRAIN
    drain_timeout_s: float = 10.0
    discard: bool = False
    """Forget the outgoing engines instead of keeping their waiting requests (an unload)."""
    keep_staged: bool = False
    """Leave the weights of outgoing models where they are if the pages are not needed: STAGED."""
    canary: Canary | None = None
    """Tried before the commit; other tokens than expected fail the exchange."""
    call: int = 0


class StageWeights(msgspec.Struct, frozen=True, tag=True):
    """Copy a model's weights into pages that nobody needs, without serving it: STAGED.

    Answered by Exchanged. It gives way: an exchange holds it up, and it ends with what has landed
    when its pages are needed. With `displace` models that are staged give their pages, those unused
    for longest first.
    """

    operation: str
    incoming: EngineSpec
    displace: bool = False
    bytes_max: int = 0
    """So many of the first bytes, rounded up to pages; 0: all. Of a packed image always all."""
    call: int = 0


class Abandon(msgspec.Struct, frozen=True, tag=True):
    """Roll the running exchange or staging back, if it is not committed.

    Answered by Done, or Failed.
    """

    operation: str
    call: int = 0


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Stop admitting requests of `model` and treat running ones by `in_flight`; weights stay.

    Answered by Done when nothing runs any more; the status is then STAGED.
    """

    model: str
    in_flight: InFlight = InFlight.DRAIN
    drain_timeout_s: float = 10.0
    call: int = 0


class Resume(msgspec.Struct, frozen=True, tag=True):
    """Let a drained model serve again. Answered by Done."""

    model: str
    call: int = 0


class MeasureLink(msgspec.Struct, frozen=True, tag=True):
    """Measure how fast the partition's link copies each way. Answered by LinkMeasured."""

    copy_bytes: int = 64 << 20
    call: int = 0


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish running requests for at most `drain_timeout_s`, then end. Answered by Done."""

    drain_timeout_s: float = 0.0
    call: int = 0


# Worker to hotbayd.


class WorkerState(msgspec.Struct, frozen=True, tag=True):
    """Answer to Describe, and the event sent every second and after each change (`call` 0)."""

    call: int
    protocol: int
    pid: int
    boot_id: str
    partition: str
    generation: int
    device: Literal["host", "cuda"]
    memory_bytes: int
    page_bytes: int
    pages_total: int
    pages_free: int
    link_bytes_per_s: float
    images: tuple[str, ...] = ()
    engines: tuple[EngineState, ...] = ()
    exchanging: str = ""
    """The operation of the exchange under way, empty when there is none."""
    exchanged: ExchangeResult | None = None
    """The last exchange that ended since the worker started."""


class StageReached(msgspec.Struct, frozen=True, tag=True):
    """An exchange reached a stage, or made progress in it."""

    operation: str
    stage: Stage
    bytes_done: int = 0
    bytes_total: int = 0
    requests_left: int = 0


class Exchanged(msgspec.Struct, frozen=True, tag=True):
    """An exchange ended, committed or rolled back."""

    call: int
    result: ExchangeResult


class LinkMeasured(msgspec.Struct, frozen=True, tag=True):
    """Answer to MeasureLink: the rate to the device, and the one from it."""

    call: int
    link_bytes_per_s: float
    out_bytes_per_s: float = 0.0


class Done(msgspec.Struct, frozen=True, tag=True):
    """A call was carried out."""

    call: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A call was refused or failed, and changed nothing.

    `reason` is of the project's catalogue of reasons, `metadata` holds the figures it names.
    """

    call: int
    reason: str
    message: str
    metadata: dict[str, str] = {}


ToWorker = (
    Describe
    | AttachImage
    | DetachImage
    | Exchange
    | StageWeights
    | Abandon
    | Drain
    | Resume
    | MeasureLink
    | Shutdown
)
FromWorker = WorkerState | StageReached | Exchanged | LinkMeasured | Done | Failed
