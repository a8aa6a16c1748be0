"""What fits where: pure functions over what the partitions and models are.

It owns the arithmetic of placement: how much context a model gets, which partition is best, what a
move would take off and put on. It never looks at a process or a clock. The invariant: every plan
counts each model with its weights and the KV of one longest request, which is what a worker
guarantees; KV beyond that is lent and comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from daemon.control.config import Worker
from daemon.control.errors import Refused
from daemon.control.state.failures import Failed
from daemon.control.state.history import Past
from daemon.control.state.parking import Holdings
from daemon.control.state.records import Facts, Plan, Version
from engine.link.control import InFlight
from swap.errors import InsufficientDeviceMemory
from swap.plan import IncomingModel, Partition, ResidentModel, plan_swap

WINDOW_ROUNDING_TOKENS = 64
"""A window and a step begin and end within blocks, which have 32 tokens at most."""


@dataclass(frozen=True)
class Resident:
    """A model that is on a partition and takes memory there.

    `copy_bytes` is what brings it in, where that is known not to be all of its weights' bytes.
    """

    model: str
    weights_bytes: int
    kv_bytes_min: int
    copy_bytes: int | None = None


@dataclass(frozen=True)
class Staged:
    """What of a model's weights a partition's spare memory holds, and what a swap would copy."""

    weights_bytes: int
    copy_bytes: int


@dataclass(frozen=True)
class PartitionView:
    """A partition whose worker is up, as plans see it.

    `residents` are the models that take its memory. Those that are only `staged` there give it as
    soon as it is needed, so that it counts as free. `busy` models have requests.
    """

    id: str
    page_bytes: int
    pages_total: int
    link_bytes_per_s: float
    residents: tuple[Resident, ...] = ()
    link_wait_ms: float = 0.0
    """How long copies of other partitions will still use the link that it shares with them."""
    staged: Mapping[str, Staged] = field(default_factory=dict)
    busy: frozenset[str] = frozenset()
    past: Past = field(default=Past(0.0))
    holdings: Holdings | None = None
    """What the engines hold by now, where that is known."""

    @property
    def pages_free(self) -> int:
        """Pages that no guarantee needs."""
        return self.pages_total - sum(self.pages(each) for each in self.residents)

    def pages(self, resident: Resident) -> int:
        return -(-resident.weights_bytes // self.page_bytes) + -(
            -resident.kv_bytes_min // self.page_bytes
        )


def context_tokens(facts: Facts, worker: Worker) -> int:
    """The longest request a model takes here: its own limit or the configured one."""
    return min(facts.context_tokens, worker.context_tokens_max)


def kv_tokens(facts: Facts, worker: Worker) -> int:
    """Tokens of the longest request whose KV is on the device at once, as a worker counts them."""
    tokens = context_tokens(facts, worker)
    if facts.kv_window_tokens:
        step_tokens = max(worker.step_tokens, worker.running_requests_max)
        tokens = min(tokens, facts.kv_window_tokens + step_tokens + WINDOW_ROUNDING_TOKENS)
    return tokens


def kv_bytes_per_token(facts: Facts, worker: Worker) -> int:
    """What keys and values of a token take as they are stored here."""
    return facts.kv_fp8_bytes_per_token if worker.kv_dtype == "fp8" else facts.kv_bytes_per_token


def facts_of(version: Version) -> Facts:
    """A usable version's facts. Raises Failed with the reason why it is not usable."""
    if version.facts is None or version.failure is not None:
        assert version.failure is not None
        raise Failed(version.failure)
    return version.facts


def resident(version: Version, worker: Worker, copy_bytes: int | None = None) -> Resident:
    """A version as something that takes device memory. Raises Failed for an unusable one."""
    facts = facts_of(version)
    kv_bytes = kv_tokens(facts, worker) * kv_bytes_per_token(facts, worker)
    return Resident(version.key, facts.weights_bytes, kv_bytes, copy_bytes)


def plan_move(
    view: PartitionView,
    outgoing: tuple[str, ...],
    incoming: Resident | None,
    build_bytes: int,
    drain_timeout_s: float = 0.0,
    in_flight: InFlight | None = None,
) -> Plan:
    """Plan to take `outgoing` off a partition and put `incoming` on it.

    Running requests are given `drain_timeout_s` to end and then treated by `in_flight`; None is for
    a move that pushes nobody's KV out of the device. Raises InsufficientDeviceMemory with the
    figure that would have to change.
    """
    staged = view.staged.get(incoming.model) if incoming is not None else None
    leaving = [each for each in view.residents if each.model in outgoing]
    plan = plan_swap(
        Partition(view.page_bytes, view.pages_total, view.pages_free, view.link_bytes_per_s),
        tuple(
            ResidentModel(each.model, each.weights_bytes, view.pages(each))
            for each in view.residents
        ),
        outgoing=tuple(each.model for each in leaving),
        incoming=(
            IncomingModel(
                incoming.model,
                incoming.weights_bytes,
                incoming.kv_bytes_min,
                incoming.copy_bytes if staged is None else staged.copy_bytes,
                min(staged.weights_bytes, incoming.weights_bytes) if staged is not None else 0,
            )
            if incoming is not None
            else None
        ),
        keep_outgoing=incoming is not None,
    )
    busy = drain_timeout_s > 0 and any(model in view.busy for model in outgoing)
    past = view.past if view.past.link_bytes_per_s else Past(view.link_bytes_per_s)
    parked_bytes = 0
    if view.holdings is not None and incoming is not None and in_flight is not None:
        parked_bytes = view.holdings.parked_bytes(
            outgoing,
            incoming.model,
            incoming.weights_bytes,
            incoming.kv_bytes_min,
            preserved=in_flight is InFlight.PRESERVE
            or (in_flight is InFlight.DRAIN and not past.drained_within(drain_timeout_s)),
        )
    return Plan(
        partition=view.id,
        outgoing=outgoing,
        incoming=plan.incoming,
        copy_bytes=plan.copy_bytes,
        evict_bytes=plan.evicted_bytes,
        build_bytes=build_bytes,
        device_bytes_needed=plan.pages_needed * view.page_bytes,
        device_bytes_available=(view.pages_free + sum(map(view.pages, leaving))) * view.page_bytes,
        predicted_ms=past.predict_ms(
            plan.copy_bytes, busy=busy, drain_timeout_s=drain_timeout_s, parked_bytes=parked_bytes
        )
        + (view.link_wait_ms if plan.copy_bytes else 0.0),
        staged_bytes=staged.weights_bytes if staged is not None else 0,
        parked_bytes=parked_bytes,
    )


def place(
    views: Iterable[PartitionView], incoming: Resident, max_active_models: int, build_bytes: int
) -> Plan:
    """Where a model fits beside what is there: where it is staged, else by most free memory.

    Without such a place the plan has no partition and its `note` says why. Raises
    InsufficientDeviceMemory when even an empty partition would be too small, and Refused
    (WORKER_UNAVAILABLE) when there is none.
    """
    ordered = sorted(
        views,
        key=lambda view: (
            -view.staged[incoming.model].weights_bytes if incoming.model in view.staged else 0,
            -view.pages_free * view.page_bytes,
            view.id,
        ),
    )
    if not ordered:
        raise Refused(
            "no partition's worker is up: see `gpuctl status` for the reason",
            reason="WORKER_UNAVAILABLE",
        )
    notes: list[str] = []
    too_small: InsufficientDeviceMemory | None = None
    for view in ordered:
        everyone = tuple(each.model for each in view.residents)
        try:
            plan_move(view, everyone, incoming, build_bytes)
        except InsufficientDeviceMemory as error:
            too_small = too_small or error
            continue
        if max_active_models and len(view.residents) >= max_active_models:
            notes.append(
                f"{view.id} has {len(view.residents)} models already "
                f"(scheduling.max_active_models = {max_active_models})"
            )
            continue
        try:
            return plan_move(view, (), incoming, build_bytes, in_flight=InFlight.PRESERVE)
        except InsufficientDeviceMemory as error:
            notes.append(f"{view.id}: {error}")
    if not notes:
        assert too_small is not None
        raise too_small
    return Plan(
        incoming=incoming.model, build_bytes=build_bytes, note="left STANDBY: " + "; ".join(notes)
    )
