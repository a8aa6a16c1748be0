"""How the node's GPUs are cut now, and what a layout file would change; it changes nothing.

It owns the reading of the present layout and of what a change would cost the models that are
placed. Planning itself is the partitioner's. The invariant: a plan rests on what NVML told in the
same call, never on an older reading. The files of the last plans are remembered, so that what was
shown can be planned again by its id, and is the same plan or none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace

from hotbay.v1 import partition_pb2

from daemon.control.errors import Refused
from daemon.control.notify import boot_id
from daemon.control.state.journal import Drop, Put
from daemon.control.state.records import KeptLayout
from daemon.control.state.world import LINK_BYTES_PER_S_UNMEASURED, ON_DEVICE, World
from partitioner.cutting import Owned
from partitioner.errors import DocumentError, NvmlError
from partitioner.executor import Sharing
from partitioner.geometry import Geometry
from partitioner.gpu import Gpu, GpuHealth
from partitioner.layout import Costs, Found, GpuPlan, GpuState, Plan
from partitioner.layout_file import export_layout
from partitioner.layout_resolve import plan_file
from partitioner.mps.static import chunk_of
from partitioner.strict_yaml import MAX_DOCUMENT_BYTES

# From this compute capability on MIG mode is switched without a reset of the GPU.
RESETLESS_CAPABILITY = (9, 0)
PLANS_REMEMBERED_MAX = 32

log = logging.getLogger(__name__)

Discover = Callable[[], Awaitable[tuple[Gpu, ...]]]
ReadGeometry = Callable[[str, int], Awaitable[Geometry]]


class Layouts:
    """Answers about layouts; `discover` and `geometry` read the GPUs."""

    def __init__(
        self, world: World, discover: Discover, geometry: ReadGeometry, sharing: Sharing
    ) -> None:
        self._world = world
        self._discover = discover
        self._geometry = geometry
        self._sharing = sharing
        self._shown: dict[str, tuple[str, str]] = {}

    async def plan(self, text: str, source: str) -> partition_pb2.LayoutPlan:
        """What the layout file `text` would change. Raises Refused, naming the line."""
        if len(text.encode()) > MAX_DOCUMENT_BYTES:
            raise Refused(
                f"the layout is larger than {MAX_DOCUMENT_BYTES} bytes", reason="LAYOUT_INVALID"
            )
        plan, _ = await self._planned(text, source)
        self._shown.pop(plan.id, None)
        self._shown[plan.id] = (text, source)
        while len(self._shown) > PLANS_REMEMBERED_MAX:
            del self._shown[next(iter(self._shown))]
        return plan_message(plan)

    async def again(self, plan_id: str) -> tuple[Plan, tuple[GpuState, ...]]:
        """A plan that was shown, and the states it rests on. Raises Refused (PLAN_STALE)."""
        if plan_id not in self._shown:
            raise Refused(
                f"this daemon has shown no plan {plan_id!r}, or has forgotten it: plan again",
                reason="PLAN_STALE",
                metadata={"plan_id": plan_id},
            )
        plan, states = await self._planned(*self._shown[plan_id])
        if plan.id != plan_id:
            raise Refused(
                f"the GPUs are no longer cut as when {plan_id} was shown (it would be {plan.id} "
                "now): look at the new plan, and apply that",
                reason="PLAN_STALE",
                metadata={"plan_id": plan_id, "plan_id_now": plan.id},
            )
        return plan, states

    async def _planned(self, text: str, source: str) -> tuple[Plan, tuple[GpuState, ...]]:
        states = tuple(await self._states())
        costs = self.costs()
        try:
            # A search, though a short one: the loop that serves everybody does not wait for it.
            plan = await asyncio.to_thread(plan_file, text, source or "layout", states, costs)
        except DocumentError as error:
            raise Refused(
                str(error), reason="LAYOUT_INVALID", metadata={"line": str(error.line)}
            ) from error
        return plan, states

    async def export(self) -> str:
        """The present layout as a file."""
        return export_layout(await self._states(), owners=self._world.owners)

    async def kept(self) -> tuple[Put | Drop, ...]:
        """For the journal: what of the present layout is ours, to be applied after a reboot."""
        try:
            states = await self._states()
        except Refused as error:
            log.warning("the layout is not kept for after a reboot: %s", error)
            return ()
        ours = [
            replace(state, instances=tuple(sorted(set(state.instances) - state.foreign)))
            for state in states
        ]
        cut = [state for state in ours if state.instances or state.shares]
        owners = self._world.owners
        if not cut and not owners:
            return (Drop(KeptLayout("", "")),)
        text = export_layout(cut, Found.IGNORE, owners) if cut else ""
        return (Put(KeptLayout(text, boot_id(), owners)),)

    async def profiles(self) -> list[partition_pb2.GpuProfiles]:
        """What each GPU that answers can be cut into."""
        read = await self._read()
        return [_profiles(gpu, geometry) for gpu, geometry in read]

    async def _read(self) -> list[tuple[Gpu, Geometry]]:
        try:
            self._world.gpus = await self._discover()
            return [
                (gpu, await self._geometry(gpu.uuid, gpu.generation))
                for gpu in self._world.gpus
                if gpu.health is GpuHealth.OK
            ]
        except NvmlError as error:
            raise Refused(f"the GPUs cannot be read: {error}", reason="GPU_LOST") from error

    async def look(self) -> list[tuple[Gpu, GpuState]]:
        """Each GPU that answers, and how it is cut now."""
        found = []
        for gpu, geometry in await self._read():
            shared = {
                place: shares
                for place, shares in (await self._sharing.shared(gpu.uuid)).items()
                if shares and (place is not None) == gpu.mig_enabled
            }
            state = replace(_state(gpu, geometry, self._world.owned), shares=shared)
            found.append((gpu, state))
        return found

    def costs(self) -> Costs:
        """What changes would cost the models that are placed."""
        return Costs(move_ms=self._move_ms())

    async def _states(self) -> list[GpuState]:
        return [state for _, state in await self.look()]

    def _move_ms(self) -> Mapping[str, float]:
        """For each partition with models: how long their weights take to be copied again."""
        costs = {}
        for partition, client in self._world.processes.workers.items():
            state = client.state
            held = [each.weights_bytes for each in state.engines if each.status in ON_DEVICE]
            if held:
                rate = state.link_bytes_per_s or LINK_BYTES_PER_S_UNMEASURED
                costs[partition] = 1000 * sum(held) / rate
        return costs


def _state(gpu: Gpu, geometry: Geometry, owned: Iterable[Owned]) -> GpuState:
    """An instance without a mark that was made for it in this boot is foreign."""
    if gpu.instances is None:
        raise Refused(
            f"gpu{gpu.index} is in MIG mode, but this daemon may not see its instances: run "
            "hotbayd as root, or let it read the driver's MIG capabilities",
            reason="INSTANCES_HIDDEN",
            metadata={"gpu": gpu.uuid},
        )
    places = tuple(each.place for each in gpu.instances)
    boot = boot_id()
    foreign = frozenset(
        each.place
        for each in gpu.instances
        if not any(mark.marks(gpu.uuid, each, boot) for mark in owned)
    )
    return GpuState(
        uuid=gpu.uuid,
        index=gpu.index,
        product=gpu.name,
        pci_id=gpu.pci_id,
        geometry=geometry,
        memory_bytes=gpu.usable_bytes,
        mig_enabled=gpu.mig_enabled,
        mig_toggle_needs_reset=gpu.compute_capability < RESETLESS_CAPABILITY,
        instances=places,
        foreign=foreign,
        sm_count=gpu.sm_count,
        sm_chunk=chunk_of(gpu.compute_capability),
    )


def plan_message(plan: Plan) -> partition_pb2.LayoutPlan:
    """A plan as the API's message."""
    return partition_pb2.LayoutPlan(
        plan_id=plan.id,
        keep=[name for gpu in plan.gpus for name in gpu.keep],
        create=[name for gpu in plan.gpus for name in gpu.create],
        destroy=[name for gpu in plan.gpus for name in gpu.destroy],
        move=[name for gpu in plan.gpus for name in gpu.move],
        foreign=[name for gpu in plan.gpus for name in gpu.foreign],
        predicted_downtime_ms=plan.downtime_ms,
        changes=plan.changes,
        gpus=[_gpu_plan(gpu) for gpu in plan.gpus],
    )


def _gpu_plan(gpu: GpuPlan) -> partition_pb2.GpuLayoutPlan:
    return partition_pb2.GpuLayoutPlan(
        gpu=gpu.uuid,
        index=gpu.index,
        mig_change=gpu.mig_change.value,
        reset=gpu.reset,
        keep=gpu.keep,
        create=gpu.create,
        destroy=gpu.destroy,
        move=gpu.move,
        foreign=gpu.foreign,
        cleared=[f"gpu{gpu.index}/{place}" for place in gpu.cleared],
        fragmentation_before=gpu.fragmentation_before,
        fragmentation_after=gpu.fragmentation_after,
        predicted_downtime_ms=gpu.downtime_ms,
    )


def _profiles(gpu: Gpu, geometry: Geometry) -> partition_pb2.GpuProfiles:
    return partition_pb2.GpuProfiles(
        gpu=gpu.uuid,
        index=gpu.index,
        product=gpu.name,
        mig_capable=gpu.mig_capable,
        mig_enabled=gpu.mig_enabled,
        memory_slots=geometry.memory_slots,
        compute_slices=geometry.compute_slices,
        profiles=[
            partition_pb2.MigProfile(
                name=each.name,
                compute_slices=each.compute_slices,
                memory_bytes=each.memory_bytes,
                multiprocessors=each.sm_count,
                instances_max=each.max_instances,
                memory_slots=each.slots,
                starts=[place.start for place in each.placements],
            )
            for each in geometry.profiles
        ],
    )
