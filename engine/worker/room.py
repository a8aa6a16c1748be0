"""Whose pages go to whom on one worker, in which order, and which are kept back meanwhile.

Owns the plans of exchanges and stagings, and the taking of pages that somebody has only for as long
as nobody needs them. There are four sorts: pages that are mapped ahead of need, cached prefixes,
weights of spare models, which are dropped, and KV that paused engines keep, which is parked. It
never takes a page that was promised. Invariants: no spare model is dropped while a page that could
be given up has nothing but cached prefixes; no KV is parked while a spare model that could go has
pages; pages held back belong to nobody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import msgspec

from engine.link.control import EngineSpec, EngineStatus, Exchange
from engine.vacating import Vacating
from engine.worker.mapper import Mapper
from engine.worker.measures import kv_pages_min
from engine.worker.resident import Resident
from swap.arena import PagePool
from swap.image import Manifest
from swap.pieces import device_bytes
from swap.plan import IncomingModel, Partition, ResidentModel, SwapPlan, plan_swap

HELD_BACK = "held back for a rollback"


class Room:
    """The pages of one worker, over its table of residents, whose steps compute at most
    `step_tokens` tokens. On the step thread only."""

    def __init__(self, pool: PagePool, residents: Mapping[str, Resident], step_tokens: int) -> None:
        self.pool = pool
        self._step_tokens = step_tokens
        self.mapper = Mapper()
        self._residents = residents
        self._held_back: tuple[int, ...] = ()

    # Plans.

    def plan(
        self, request: Exchange, outgoing: Sequence[Resident], manifest: Manifest | None
    ) -> SwapPlan:
        """Whose weights leave the device for an exchange, as things stand; `manifest` is of the
        incoming image. Raises InsufficientDeviceMemory with the figures."""
        self.release_unused()
        spec = request.incoming
        present = self._residents.get(spec.model) if spec is not None else None
        incoming: IncomingModel | None = None
        own = 0
        # What was drained, and not by an exchange, has its pages already.
        if spec is not None and (present is None or present.needs_pages):
            assert manifest is not None
            pages = kv_pages_min(spec, manifest, self.pool.page_bytes, self._step_tokens)
            own = min(present.pages_kept, pages) if present is not None else 0
            self._release_cached(self.pool.pages_for(device_bytes(manifest)) + pages - own)
            incoming = IncomingModel(
                model=spec.model,
                weights_bytes=device_bytes(manifest),
                kv_bytes_min=pages * self.pool.page_bytes,
                copy_bytes=manifest.stored_bytes,
            )
            if present is not None and fits(present, spec):
                incoming = dataclasses.replace(
                    incoming,
                    copy_bytes=present.weights.copy_bytes,
                    staged_bytes=self._weights_bytes(present),
                )
        others = [one for one in self._residents.values() if one is not present]
        return plan_swap(
            self._partition(pages_own=own),
            tuple(
                ResidentModel(one.model, self._weights_bytes(one), one.pages - one.pages_kept)
                for one in others
                if one.pages > one.pages_kept or one in outgoing
            ),
            outgoing=tuple(one.model for one in outgoing),
            incoming=incoming,
            may_evict=tuple(
                one.model for one in self.spares() if one is not present and one not in outgoing
            ),
            keep_outgoing=request.keep_staged,
        )

    def plan_staging(self, spec: EngineSpec, size_bytes: int, *, displace: bool) -> None:
        """Whether so many bytes more of a model's weights find room if spare models leave, but
        nobody's KV. Raises InsufficientDeviceMemory with the figures."""
        self.release_unused()
        self._release_cached(self.pool.pages_for(size_bytes))
        others = [one for one in self._residents.values() if one.model != spec.model]
        spares = [one for one in self.spares() if one in others] if displace else []
        plan_swap(
            Partition(self.pool.page_bytes, self.pool.total_pages, self.pool.free_pages, 1.0),
            tuple(
                ResidentModel(one.model, self._weights_bytes(one), one.weights.pages)
                for one in others
                if one.pages
            ),
            outgoing=(),
            incoming=IncomingModel(spec.model, size_bytes, 0),
            may_evict=tuple(one.model for one in spares),
        )

    def _weights_bytes(self, resident: Resident) -> int:
        """What its weights have of the device, in whole pages."""
        return resident.weights.pages * self.pool.page_bytes

    def _partition(self, pages_own: int) -> Partition:
        """The partition, of whose kept KV pages the incoming model's `pages_own` cost nothing."""
        kept = sum(one.pages_kept for one in self._paused())
        return Partition(
            page_bytes=self.pool.page_bytes,
            pages_total=self.pool.total_pages,
            pages_free=self.pool.free_pages + pages_own,
            link_bytes_per_s=1.0,  # a worker predicts no times
            pages_kept=kept - pages_own,
        )

    # Taking.

    def spares(self) -> list[Resident]:
        """Models whose weights may be dropped, who was unused for longest first.

        What a call works on is left alone: its pages are part of that call's account.
        """
        found = [
            one
            for one in self._residents.values()
            if one.spare and one.weights.pages and not one.claimed
        ]
        return sorted(found, key=lambda one: (one.used_at, one.model))

    def drop_spares(self, pages: int, then: Sequence[Resident] = ()) -> int:
        """Have spare models give weights until `pages` more are free, or none is left; `then` are
        asked after the others. Returns bytes of weights."""
        wanted, given_bytes = self.pool.free_pages + pages, 0
        for resident in (*self.spares(), *then):
            lacking = wanted - self.pool.free_pages
            if lacking <= 0:
                break
            given_bytes += resident.give(lacking)
        return given_bytes

    def reclaim(self, pages: int) -> None:
        """Free up to `pages` pages at once, for an engine that serves: what others do not use, then
        prefixes they have cached, then weights that nobody needs now, then KV that waits.

        What a call works on is left alone: its pages are part of that call's account.
        """
        wanted = self.pool.free_pages + pages
        others = [one for one in self._residents.values() if not one.claimed]
        for resident in others:
            if self.pool.free_pages < wanted:
                resident.release_unused()
        for resident in others:
            missing = wanted - self.pool.free_pages
            if missing > 0:
                resident.release_cached(missing)
        self.drop_spares(wanted - self.pool.free_pages)
        for resident in others:
            count = min(wanted - self.pool.free_pages, resident.pages_kept)
            if count > 0:
                _vacate_now(resident, count)

    def release_unused(self) -> None:
        """Have no page mapped for nothing, so that the pool's account is exact."""
        for resident in self._residents.values():
            resident.release_unused()

    def _release_cached(self, pages: int) -> None:
        """Have cached prefixes give way until `pages` pages are free, or no more can be freed."""
        for resident in self._residents.values():
            missing = pages - self.pool.free_pages
            if missing > 0:
                resident.release_cached(missing)

    def map_ahead(self, ahead: bool) -> None:
        """Have KV pages mapped ahead of need from now on, or none while pages change hands."""
        self.mapper.paused = not ahead
        for resident in self._residents.values():
            resident.map_ahead()

    def free_for_measuring(self, size_bytes: int) -> None:
        """Have spare models go for a copy of so many bytes; KV only where not a page is free."""
        self.release_unused()
        self._release_cached(self.pool.pages_for(size_bytes))
        self.drop_spares(self.pool.pages_for(size_bytes) - self.pool.free_pages)
        if not self.pool.free_pages:
            self.reclaim(1)

    def vacate(
        self, pages: int, incoming: Resident, outgoing: Sequence[Resident]
    ) -> list[tuple[Resident, Vacating]]:
        """Begin to free `pages` KV pages of paused engines for `incoming`: of those whose turn is
        over, then of those that leave, and its own beyond what it needs itself."""
        others = [one for one in self._paused() if one is not incoming and one not in outgoing]
        begun = []
        for resident in (*others, *outgoing, incoming):
            kept = resident.pages_kept
            if resident is incoming:
                kept -= resident.kv_pages_min
            if pages > 0 and kept > 0:
                begun.append((resident, resident.vacate(min(pages, kept))))
                pages -= kept
        return begun

    def make_room(self, resident: Resident) -> None:
        """Free what others have of the pages that a model on its way back needs."""
        self._release_cached(resident.pages_missing)
        self.drop_spares(resident.pages_missing - self.pool.free_pages)
        missing = resident.pages_missing - self.pool.free_pages
        for other in self._paused():
            count = min(missing, other.pages_kept)
            if count > 0 and other is not resident:
                _vacate_now(other, count)
                missing = resident.pages_missing - self.pool.free_pages

    def hold_back(self, pages: int) -> None:
        """Keep pages out of everybody's reach: as many as given, 0 for none."""
        self.pool.give_back(HELD_BACK, self._held_back)
        self._held_back = ()
        self._held_back = self.pool.take(HELD_BACK, max(pages, 0))

    def _paused(self) -> list[Resident]:
        return [one for one in self._residents.values() if one.pages_kept]


def fits(resident: Resident, spec: EngineSpec) -> bool:
    """Whether a resident is what a spec asks for, so that it need not be made anew.

    Its weight beside others can be changed as it is.
    """
    same = msgspec.structs.replace(spec, weight=resident.spec.weight) == resident.spec
    return same and resident.status is not EngineStatus.FAILED


def _vacate_now(resident: Resident, pages: int) -> None:
    vacating = resident.vacate(pages)
    vacating.copy(lambda: None)
    vacating.release()
