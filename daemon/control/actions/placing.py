"""Which models could go where on this node, and which partitions are worth moving; plans only.

It owns the way from the node as it is to the partitioner's packing, and back to the API's messages.
It decides nothing and changes nothing: what comes out is a layout that is planned, shown and
applied like any other. The invariants: packing rests on GPUs that were read in the same call; GPUs
that are cordoned are not packed onto.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hotbay.v1 import placement_pb2

from daemon.control.actions.layouts import Layouts, plan_message
from daemon.control.errors import ControlError, Refused
from daemon.control.state.planning import facts_of, kv_bytes_per_token, kv_tokens
from daemon.control.state.world import World
from partitioner.catalogue import load_catalogue
from partitioner.errors import DocumentError
from partitioner.geometry import fragmentation
from partitioner.gpu import Gpu
from partitioner.layout import Costs, Found, GpuState, Plan
from partitioner.layout_file import export_layout
from partitioner.packing.defragmenting import WORTH_MS_PER_GIB, Weighed, weigh
from partitioner.packing.layout_text import layout_text, partitions
from partitioner.packing.models_file import KnownModel, parse_models
from partitioner.packing.packer import pack
from partitioner.packing.sharing import Rules, load_rules
from partitioner.packing.values import Bin, Filled, ModelNeed, Packing
from partitioner.packing.why import explain
from partitioner.strict_yaml import MAX_DOCUMENT_BYTES

# What a page is on a GPU where the configuration leaves it to the worker.
CUDA_PAGE_BYTES = 64 << 20
WORTH_MS_PER_GIB_MAX = 1e9


class Placing:
    """Answers about placements; `layouts` reads the GPUs."""

    def __init__(self, world: World, layouts: Layouts) -> None:
        self._world = world
        self._layouts = layouts
        self._catalogue = load_catalogue()

    async def plan(self, text: str, source: str) -> placement_pb2.PlacementPlan:
        """A place for each model of the file, as far as there is one. Raises Refused."""
        if len(text.encode()) > MAX_DOCUMENT_BYTES:
            raise Refused(
                f"the models file is larger than {MAX_DOCUMENT_BYTES} bytes",
                reason="INVALID_ARGUMENT",
            )
        try:
            models = parse_models(text, source or "models", self._find)
        except DocumentError as error:
            raise Refused(
                str(error), reason="INVALID_ARGUMENT", metadata={"line": str(error.line)}
            ) from error
        looked = await self._layouts.look()
        cordoned = self._world.closures.cordons
        bins = [self._bin(*each) for each in looked if each[0].uuid not in cordoned]
        worker = self._world.config.worker
        rules = load_rules(worker.page_bytes or CUDA_PAGE_BYTES, worker.workspace_bytes)
        costs = self._layouts.costs()
        # A search of up to a second: the loop that serves everybody does not wait for it.
        return await asyncio.to_thread(_placement, models, bins, rules, costs)

    async def defragment(self, worth_ms_per_gib: float) -> placement_pb2.DefragmentationPlan:
        """What is worth moving. Raises Refused."""
        if not 0 <= worth_ms_per_gib <= WORTH_MS_PER_GIB_MAX:
            raise Refused(
                f"worth_ms_per_gib must lie between 0 and {WORTH_MS_PER_GIB_MAX:g}",
                reason="INVALID_ARGUMENT",
            )
        worth = worth_ms_per_gib or WORTH_MS_PER_GIB
        states = [state for _, state in await self._layouts.look()]
        weighed = await asyncio.to_thread(weigh, states, self._layouts.costs(), worth)
        chosen = [each.then for each in weighed if each.worth_it]
        answer = placement_pb2.DefragmentationPlan(
            gpus=[_weighed(each) for each in weighed], worth_ms_per_gib=worth
        )
        if chosen:
            answer.layout = export_layout(chosen, Found.IGNORE)
            answer.plan.CopyFrom(await self._layouts.plan(answer.layout, "defragmentation"))
        else:
            answer.plan.CopyFrom(plan_message(Plan("", ())))
        return answer

    def _find(self, name: str) -> KnownModel:
        try:
            version = self._world.registry.resolve(name)
            facts = facts_of(version)
        except ControlError as error:
            raise LookupError(str(error)) from error
        worker = self._world.config.worker
        # Beyond its window a model neither holds nor reads what its context has.
        return KnownModel(
            facts.weights_bytes, kv_bytes_per_token(facts, worker), kv_tokens(facts, worker)
        )

    def _bin(self, gpu: Gpu, state: GpuState) -> Bin:
        board = self._catalogue.by_pci_device_id(gpu.pci_device_id)
        largest = max((each.sm_count for each in state.geometry.profiles), default=0)
        return Bin(
            state,
            sm_count=gpu.sm_count or largest,
            bytes_per_s=board.memory_gb_per_s * 1e9 if board is not None else 0.0,
        )


def _placement(
    models: Sequence[ModelNeed], bins: Sequence[Bin], rules: Rules, costs: Costs
) -> placement_pb2.PlacementPlan:
    packing = pack(models, bins, rules, costs)
    return placement_pb2.PlacementPlan(
        placed=[place for each in packing.filled for place in _places(each, models, rules)],
        left_out=[
            placement_pb2.ModelLeftOut(
                model=models[each.model].name,
                reason=each.reason,
                remedy=each.remedy,
                line=models[each.model].line,
            )
            for each in explain(models, bins, rules, packing)
        ],
        layout=layout_text(packing, models, rules),
        value=packing.value,
        value_asked=sum(each.value for each in models),
        gpus=_fills(bins, packing),
    )


def _places(
    filled: Filled, models: Sequence[ModelNeed], rules: Rules
) -> list[placement_pb2.ModelPlace]:
    places = []
    for name, arrangement, group in partitions(filled):
        times = dict(zip(arrangement.models, arrangement.ms_per_token, strict=True))
        worker = next(each for each in arrangement.workers if each.models == group)
        places += [
            placement_pb2.ModelPlace(
                model=models[index].name,
                tenant=models[index].tenant,
                partition=name,
                memory_bytes=rules.model_bytes(models[index].weights_bytes, models[index].kv_bytes),
                partition_bytes=worker.memory_bytes,
                predicted_ms_per_token=times[index],
                ms_per_token=models[index].ms_per_token,
                beside=[models[other].name for other in group if other != index],
            )
            for index in group
        ]
    return places


def _fills(bins: Sequence[Bin], packing: Packing) -> list[placement_pb2.GpuFill]:
    used = {each.bin.state.uuid: each for each in packing.filled}
    fills = []
    for each in sorted(bins, key=lambda each: each.state.index):
        state, filled = each.state, used.get(each.state.uuid)
        before = fragmentation(state.geometry, state.instances)
        after = before
        if filled is not None:
            places = [place for place, _ in filled.rooms if place is not None]
            whole = len(places) < len(filled.rooms)
            stands = (*places, *state.foreign)
            after = 0.0 if whole else fragmentation(state.geometry, stands)
        fills.append(
            placement_pb2.GpuFill(
                gpu=state.uuid,
                index=state.index,
                used_bytes=sum(room.used_bytes for _, room in filled.rooms) if filled else 0,
                memory_bytes=state.memory_bytes,
                fragmentation_before=before,
                fragmentation_after=after,
            )
        )
    return fills


def _weighed(each: Weighed) -> placement_pb2.GpuDefragmentation:
    return placement_pb2.GpuDefragmentation(
        gpu=each.state.uuid,
        index=each.state.index,
        worth_it=each.worth_it,
        move=each.moved,
        fragmentation_before=each.before,
        fragmentation_after=each.after,
        gained_bytes=int(each.gained_bytes),
        gain_ms=each.gain_ms,
        cost_ms=each.cost_ms,
    )
