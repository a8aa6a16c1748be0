"""Planning a swap: what is evicted, what is copied, how long it takes, or what is missing.

It owns the arithmetic and nothing else: a pure function over frozen values, the same for a dry run
and for the swap itself. It never asks the device. Invariant: a plan that is returned fits, in whole
pages; one that does not fit names the figure that would have to change.
"""

from __future__ import annotations

from dataclasses import dataclass

from swap.errors import InsufficientDeviceMemory


@dataclass(frozen=True)
class Partition:
    """A partition as it is now. The link's rate is the measured one, or its throttle.

    `pages_kept` hold KV of paused requests, which has to be parked before they can be used: they
    are counted with only when nothing else is left.
    """

    page_bytes: int
    pages_total: int
    pages_free: int
    link_bytes_per_s: float
    pages_kept: int = 0


@dataclass(frozen=True)
class ResidentModel:
    """A model on the partition: `pages` for its weights and KV together."""

    model: str
    weights_bytes: int
    pages: int


@dataclass(frozen=True)
class IncomingModel:
    """A model to be put on the partition; `kv_bytes_min` is what one longest request takes.

    `copy_bytes` is what crosses the link, where that is not all of the weights' bytes.
    `staged_bytes` of its memory for weights it has already, in whole pages or all of it.
    """

    model: str
    weights_bytes: int
    kv_bytes_min: int
    copy_bytes: int | None = None
    staged_bytes: int = 0


@dataclass(frozen=True)
class SwapPlan:
    """What a swap will do. Evicted weights are not copied anywhere: their image stays.

    `evicted` models give pages, those without which it can be done from the last one on: of whom
    `evicted_bytes` tell how much of their weights goes.
    """

    incoming: str
    evicted: tuple[str, ...]
    evicted_bytes: int
    copy_bytes: int
    pages_needed: int
    pages_freed: int
    pages_free_after: int
    predicted_ms: float


def plan_swap(
    partition: Partition,
    residents: tuple[ResidentModel, ...],
    *,
    outgoing: tuple[str, ...],
    incoming: IncomingModel | None,
    may_evict: tuple[str, ...] = (),
    keep_outgoing: bool = False,
    overhead_ms: float = 0.0,
) -> SwapPlan:
    """Plan to take `outgoing` off the partition and put `incoming` on it.

    Models of `may_evict` go too, in that order, for as long as there is not enough room. With
    `keep_outgoing` the outgoing models give their KV, and their weights only if there is not enough
    room after all those have gone. `overhead_ms` is what a swap takes besides copying, as measured
    before. Raises InsufficientDeviceMemory, and ValueError for models that are not there or are
    there already.
    """
    by_name = {resident.model: resident for resident in residents}
    missing = [model for model in (*outgoing, *may_evict) if model not in by_name]
    if missing:
        raise ValueError(f"not on the partition: {', '.join(missing)}")
    if incoming is not None and incoming.model in by_name and incoming.model not in outgoing:
        raise ValueError(f"{incoming.model} is on the partition already")
    needed = 0
    if incoming is not None:
        needed = _pages(incoming.kv_bytes_min, partition)
        needed += _pages(incoming.weights_bytes, partition)
        needed -= _pages(incoming.staged_bytes, partition)
    leaving = tuple(dict.fromkeys(outgoing))
    held = {model: by_name[model].pages for model in (*leaving, *may_evict)}
    free = partition.pages_free
    evicted: list[str] = []
    evicted_bytes = 0
    if keep_outgoing:
        for model in leaving:
            kept = min(_pages(by_name[model].weights_bytes, partition), held[model])
            free += held[model] - kept
            held[model] = kept
        candidates = [*(model for model in may_evict if model not in leaving), *leaving]
    else:
        evicted += leaving
        evicted_bytes = sum(by_name[model].weights_bytes for model in leaving)
        free += sum(held[model] for model in leaving)
        candidates = [model for model in may_evict if model not in leaving]
    for model in candidates:
        if free >= needed:
            break
        evicted.append(model)
        given = min(held[model], needed - free)
        kept_bytes = (held[model] - given) * partition.page_bytes
        evicted_bytes += max(0, by_name[model].weights_bytes - kept_bytes)
        free += given
    freed = free - partition.pages_free
    free += partition.pages_kept
    if incoming is not None and free < needed:
        staying = tuple(resident for resident in residents if resident.model not in evicted)
        raise _insufficient(partition, incoming, needed, free, staying)
    copy_bytes = 0
    if incoming is not None:
        copy_bytes = incoming.weights_bytes if incoming.copy_bytes is None else incoming.copy_bytes
    return SwapPlan(
        incoming=incoming.model if incoming is not None else "",
        evicted=tuple(evicted),
        evicted_bytes=evicted_bytes,
        copy_bytes=copy_bytes,
        pages_needed=needed,
        pages_freed=freed,
        pages_free_after=free - needed,
        predicted_ms=copy_bytes / partition.link_bytes_per_s * 1000 + overhead_ms,
    )


def _pages(size_bytes: int, partition: Partition) -> int:
    return -(-size_bytes // partition.page_bytes)


def _insufficient(
    partition: Partition,
    incoming: IncomingModel,
    needed: int,
    free: int,
    staying: tuple[ResidentModel, ...],
) -> InsufficientDeviceMemory:
    needed_bytes, available_bytes = needed * partition.page_bytes, free * partition.page_bytes
    total_bytes = partition.pages_total * partition.page_bytes
    if needed > partition.pages_total:
        change = f"use a partition of at least {needed_bytes} bytes, or less context"
    elif staying:
        names = ", ".join(resident.model for resident in staying)
        change = f"take {needed_bytes - available_bytes} bytes more off it: {names} would stay"
    else:
        change = f"wait until {needed_bytes - available_bytes} bytes more are free"
    return InsufficientDeviceMemory(
        f"{incoming.model} needs {needed_bytes} bytes of device memory ({incoming.weights_bytes} "
        f"for weights, {incoming.kv_bytes_min} for KV, in whole pages); {available_bytes} of "
        f"{total_bytes} would be free: {change}",
        needed_bytes=needed_bytes,
        available_bytes=available_bytes,
        total_bytes=total_bytes,
        weights_bytes=incoming.weights_bytes,
        kv_bytes_min=incoming.kv_bytes_min,
    )
