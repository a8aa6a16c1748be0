"""What a layout file means on the GPUs that are there, and whether they can do it at all.

It owns the choosing of GPUs by an entry, of profiles by name or need, and the checks of shares
against their place. It touches nothing and chooses no placements: that is the planner's. The
invariant: what comes out is allowed piece by piece; only whether the pieces fit together is open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from partitioner.errors import DocumentError, LayoutDoesNotFitError
from partitioner.geometry import Profile
from partitioner.layout import Costs, Found, GpuState, GpuWanted, Plan, Wanted
from partitioner.layout_file import (
    GpuEntry,
    LayoutFile,
    PartitionEntry,
    ShareEntry,
    format_size,
    parse_layout,
    parse_size,
)
from partitioner.planner import plan
from partitioner.strict_yaml import KeyPath, nearest


def plan_file(text: str, source: str, states: Sequence[GpuState], costs: Costs) -> Plan:
    """Plan what a layout file asks; raises `DocumentError` with the line that must change.

    With `found: adopt` instances that are marked as foreign are treated as ours; with `destroy`
    too, once they are empty.
    """
    file, lines = parse_layout(text, source)
    have = list(states)
    if file.found is not Found.IGNORE:
        have = [_adopted(state, file.found) for state in have]
    wanted = resolve(file, lines, source, have)
    try:
        return plan(have, wanted, costs)
    except LayoutDoesNotFitError as error:
        raise DocumentError(source, error.line, error.problem) from error


def _adopted(state: GpuState, found: Found) -> GpuState:
    cleared = state.foreign if found is Found.DESTROY else frozenset()
    return replace(state, foreign=frozenset(), cleared=cleared)


def resolve(
    file: LayoutFile, lines: Mapping[KeyPath, int], source: str, states: Sequence[GpuState]
) -> tuple[GpuWanted, ...]:
    """Turn each entry into what is wanted of each GPU that it chooses."""
    reader = _Resolver(lines, source, states)
    wanted: dict[str, GpuWanted] = {}
    for index, entry in enumerate(file.gpus):
        path: KeyPath = ("gpus", index)
        for state in reader.chosen(entry, path):
            if state.uuid in wanted:
                raise reader.refusal(
                    path,
                    f"chooses gpu{state.index}, which line {wanted[state.uuid].line} has chosen "
                    "already; make one of the two more exact",
                )
            wanted[state.uuid] = reader.gpu(entry, path, state)
    return tuple(wanted.values())


class _Resolver:
    def __init__(
        self, lines: Mapping[KeyPath, int], source: str, states: Sequence[GpuState]
    ) -> None:
        self._lines = lines
        self._source = source
        self._states = states

    def line(self, path: KeyPath) -> int:
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 0)

    def refusal(self, path: KeyPath, problem: str) -> DocumentError:
        return DocumentError(self._source, self.line(path), problem)

    def chosen(self, entry: GpuEntry, path: KeyPath) -> list[GpuState]:
        """The GPUs that all of the entry's selectors match; none is an error."""
        found = [state for state in self._states if _matches(entry, state)]
        if found:
            return found
        asked = ", ".join(f"{key} {value}" for key, value in entry.selectors().items())
        there = ", ".join(
            f"gpu{each.index} {each.product} ({each.pci_id}, {each.uuid})" for each in self._states
        )
        raise self.refusal(path, f"no GPU of this node has {asked}; there are: {there or 'none'}")

    def gpu(self, entry: GpuEntry, path: KeyPath, state: GpuState) -> GpuWanted:
        self._check_shares(entry.shares, (*path, "shares"), state.memory_bytes, "the GPU")
        self._check_static(entry.shares, (*path, "shares"), state)
        shares = tuple(each.share() for each in entry.shares)
        instances: tuple[Wanted, ...] | None = None
        if entry.partitions is not None:
            if not state.geometry.profiles:
                raise self.refusal(
                    (*path, "partitions"),
                    f"gpu{state.index} ({state.product}) cannot be cut into instances: it has no "
                    "MIG; use `shares`, or take `partitions` away",
                )
            instances = tuple(
                self._partition(each, (*path, "partitions", index), state)
                for index, each in enumerate(entry.partitions)
            )
            self._check_starts(entry.partitions, path, state)
        return GpuWanted(state.uuid, instances, shares, entry.owner or "", self.line(path))

    def _partition(self, entry: PartitionEntry, path: KeyPath, state: GpuState) -> Wanted:
        named = entry.profile is not None
        profiles = self._named(entry, path, state) if named else self._by_need(entry, path, state)
        options = tuple(place for profile in profiles for place in profile.placements)
        what = entry.profile or _need(entry)
        if entry.start is not None:
            options = tuple(place for place in options if place.start == entry.start)
            what = f"{entry.profile}@{entry.start}"
            if not options:
                starts = ", ".join(str(place.start) for place in profiles[0].placements)
                raise self.refusal(
                    (*path, "start"),
                    f"{entry.profile} cannot start at slot {entry.start} of gpu{state.index}; it "
                    f"can at {starts}",
                )
        # Every profile that serves a need is as large as the smallest in the list, or larger.
        room_bytes = min(profile.memory_bytes for profile in profiles)
        self._check_shares(entry.shares, (*path, "shares"), room_bytes, what)
        for index, each in enumerate(entry.shares):
            if each.sm is not None:
                raise self.refusal(
                    (*path, "shares", index, "sm"),
                    "only shares of a whole GPU can have multiprocessors to themselves: write "
                    "`threads`, or an instance for each",
                )
        shares = tuple(each.share() for each in entry.shares)
        return Wanted(options, what, entry.owner or "", shares, self.line(path))

    def _named(self, entry: PartitionEntry, path: KeyPath, state: GpuState) -> list[Profile]:
        name = entry.profile or ""
        profile = state.geometry.by_name.get(name)
        if profile is not None:
            return [profile]
        known = list(state.geometry.by_name)
        raise self.refusal(
            (*path, "profile"),
            f"gpu{state.index} ({state.product}) has no profile {name!r}{nearest(name, known)}; it "
            f"has {', '.join(known)}",
        )

    def _by_need(self, entry: PartitionEntry, path: KeyPath, state: GpuState) -> list[Profile]:
        memory_bytes = parse_size(entry.memory) if entry.memory else 0
        sm_count = entry.sm or 0
        enough = [
            each
            for each in state.geometry.plain
            if each.memory_bytes >= memory_bytes and each.sm_count >= sm_count
        ]
        if enough:
            return enough
        largest = max(state.geometry.plain, key=lambda each: (each.memory_bytes, each.sm_count))
        raise self.refusal(
            path,
            f"no instance of gpu{state.index} ({state.product}) has {_need(entry)}; the largest, "
            f"{largest.name}, has {format_size(largest.memory_bytes)} and {largest.sm_count} SM",
        )

    def _check_starts(
        self, entries: Sequence[PartitionEntry], path: KeyPath, state: GpuState
    ) -> None:
        """Refuse two explicit placements that overlap, at the line of the later one."""
        seen: list[tuple[int, PartitionEntry, int]] = []
        foreign = sorted(state.foreign)
        for index, entry in enumerate(entries):
            if entry.profile is None or entry.start is None:
                continue
            profile = state.geometry.by_name[entry.profile]
            mask = next(each.mask for each in profile.placements if each.start == entry.start)
            here = (*path, "partitions", index)
            what = f"{entry.profile}@{entry.start}"
            for place in foreign:
                if place.mask & mask:
                    raise self.refusal(
                        here,
                        f"{what} overlaps {state.partition_id(place)}, which is there and not "
                        "ours; take another start, or say `found: adopt` to take it over",
                    )
            for line, other, taken in seen:
                if taken & mask:
                    raise self.refusal(
                        here,
                        f"{what} overlaps {other.profile}@{other.start} of line {line}; take "
                        "another start, or leave `start` away",
                    )
            seen.append((self.line(here), entry, mask))

    def _check_shares(
        self, shares: Sequence[ShareEntry], path: KeyPath, room_bytes: int, where: str
    ) -> None:
        """Shares may not promise more memory than their place has."""
        limits = [each.share().memory_bytes or 0 for each in shares]
        promised_bytes = 0
        for index, limit in enumerate(limits):
            promised_bytes += limit
            if promised_bytes > room_bytes:
                raise self.refusal(
                    (*path, index),
                    f"the shares up to here promise {format_size(promised_bytes)}, {where} has "
                    f"{format_size(room_bytes)}; lower their memory by "
                    f"{format_size(_up_to_mib(sum(limits) - room_bytes))} in all",
                )

    def _check_static(self, shares: Sequence[ShareEntry], path: KeyPath, state: GpuState) -> None:
        """Multiprocessors are given away in whole chunks, each once, and to all shares or none."""
        if all(each.sm is None for each in shares):
            return
        chunk, where = state.sm_chunk, f"gpu{state.index} ({state.product})"
        room = state.sm_count // chunk * chunk if chunk else 0
        given = 0
        for index, each in enumerate(shares):
            if each.sm is None:
                raise self.refusal(
                    (*path, index),
                    "where one share has multiprocessors to itself nobody comes in without: give "
                    "this one `sm` too, or write `threads` everywhere",
                )
            here = (*path, index, "sm")
            if not room:
                raise self.refusal(
                    here,
                    f"{where} gives no share multiprocessors of its own, which takes an Ampere GPU "
                    "or a newer one: write `threads`",
                )
            if each.sm % chunk:
                below, above = each.sm // chunk * chunk, -(-each.sm // chunk) * chunk
                fit = " or ".join(str(one) for one in (below, above) if 0 < one <= room)
                raise self.refusal(
                    here,
                    f"{where} gives multiprocessors away {chunk} at a time, so {each.sm} does not "
                    f"come out even: write {fit or room}",
                )
            given += each.sm
            if given > room:
                wanted = sum(one.sm or 0 for one in shares)
                raise self.refusal(
                    here,
                    f"the shares up to here have {given} multiprocessors to themselves, {where} "
                    f"has {room} in whole chunks of {chunk}; lower their sm by {wanted - room} in "
                    "all",
                )


def _up_to_mib(size_bytes: int) -> int:
    return -(-size_bytes // (1 << 20)) << 20


def _matches(entry: GpuEntry, state: GpuState) -> bool:
    return (
        entry.uuid in (None, state.uuid)
        and entry.index in (None, state.index)
        and (entry.product is None or entry.product.lower() == state.product.lower())
        and (entry.pci is None or _bus(entry.pci) == _bus(state.pci_id))
    )


def _bus(pci_id: str) -> str:
    """A PCI address without the zeros that some tools put before the domain, in lower case."""
    domain, _, rest = pci_id.lower().partition(":")
    if rest.count(":") == 0:  # No domain was given.
        domain, rest = "0", pci_id.lower()
    return f"{domain.lstrip('0') or '0'}:{rest}"


def _need(entry: PartitionEntry) -> str:
    parts = [entry.memory or "", f"{entry.sm} SM" if entry.sm else ""]
    return " and ".join(part for part in parts if part)
