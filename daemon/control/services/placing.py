"""hotbay.v1.PlacementService: where models could go, and which partitions are worth moving."""

from __future__ import annotations

from hotbay.v1 import placement_pb2

from daemon.control.actions.placing import Placing
from daemon.control.services import requests


class PlacementService:
    """Plans only; a plan becomes so through PartitionService.ApplyLayout."""

    def __init__(self, placing: Placing) -> None:
        self._placing = placing

    async def PlanPlacement(
        self, request: placement_pb2.PlanPlacementRequest
    ) -> placement_pb2.PlacementPlan:
        text = requests.required("models", request.models)
        return await self._placing.plan(text, request.source)

    async def PlanDefragmentation(
        self, request: placement_pb2.PlanDefragmentationRequest
    ) -> placement_pb2.DefragmentationPlan:
        return await self._placing.defragment(request.worth_ms_per_gib)
