"""What fits where: pure functions over what the partitions and models are.

It owns the arithmetic of placement: how much context a model gets, which partition is best, what a
move would take off and put on. It never looks at a process or a clock. The invariant: every plan
counts each model with its weights and the KV of one longest request, which is what a worker
guarantees; KV beyond that is lent and comes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from daemon.control.config import Worker
from daemon.control.errors import Refused
from daemon.control.failures import Failed
from daemon.control.records import Facts, Plan, Version
from swap.errors import InsufficientDeviceMemory
from swap.plan import IncomingModel, Partition, ResidentModel, plan_swap


@dataclass(frozen=True)
class Resident:
    """A model that is on a partition and takes memory there."""

    model: str
    weights_bytes: int
    kv_bytes_min: int


@dataclass(frozen=True)
class PartitionView:
    """A partition whose worker is up, as plans see it. `resident` holds what takes its memory."""

    id: str
    page_bytes: int
    pages_total: int
    link_bytes_per_s: float
    residents: tuple[Resident, ...] = ()
    overhead_ms: float = 0.0
    """What an exchange took here last time besides draining and copying."""

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


def facts_of(version: Version) -> Facts:
    """A usable version's facts. Raises Failed with the reason why it is not usable."""
    if version.facts is None or version.failure is not None:
        assert version.failure is not None
        raise Failed(version.failure)
    return version.facts


def resident(version: Version, worker: Worker) -> Resident:
    """A version as something that takes device memory. Raises Failed for an unusable one."""
    facts = facts_of(version)
    kv_bytes = context_tokens(facts, worker) * facts.kv_bytes_per_token
    return Resident(version.key, facts.weights_bytes, kv_bytes)


def plan_move(
    view: PartitionView, outgoing: tuple[str, ...], incoming: Resident | None, build_bytes: int
) -> Plan:
    """Plan to take `outgoing` off a partition and put `incoming` on it.

    Raises InsufficientDeviceMemory with the figure that would have to change.
    """
    plan = plan_swap(
        Partition(view.page_bytes, view.pages_total, view.pages_free, view.link_bytes_per_s),
        tuple(
            ResidentModel(each.model, each.weights_bytes, view.pages(each))
            for each in view.residents
        ),
        outgoing=tuple(
            model for model in outgoing if any(each.model == model for each in view.residents)
        ),
        incoming=(
            IncomingModel(incoming.model, incoming.weights_bytes, incoming.kv_bytes_min)
            if incoming is not None
            else None
        ),
        overhead_ms=view.overhead_ms,
    )
    return Plan(
        partition=view.id,
        outgoing=outgoing,
        incoming=plan.incoming,
        copy_bytes=plan.copy_bytes,
        evict_bytes=plan.evicted_bytes,
        build_bytes=build_bytes,
        device_bytes_needed=plan.pages_needed * view.page_bytes,
        device_bytes_available=(view.pages_free + plan.pages_freed) * view.page_bytes,
        predicted_ms=plan.predicted_ms,
    )


def place(
    views: Iterable[PartitionView], incoming: Resident, max_active_models: int, build_bytes: int
) -> Plan:
    """Where a model fits beside what is there, most free memory first.

    Without such a place the plan has no partition and its `note` says why. Raises
    InsufficientDeviceMemory when even an empty partition would be too small, and Refused
    (WORKER_UNAVAILABLE) when there is none.
    """
    ordered = sorted(views, key=lambda view: (-view.pages_free * view.page_bytes, view.id))
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
            return plan_move(view, (), incoming, build_bytes)
        except InsufficientDeviceMemory as error:
            notes.append(f"{view.id}: {error}")
    if not notes:
        assert too_small is not None
        raise too_small
    return Plan(
        incoming=incoming.model, build_bytes=build_bytes, note="left STANDBY: " + "; ".join(notes)
    )
