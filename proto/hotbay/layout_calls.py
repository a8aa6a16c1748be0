"""Calls about partitions, how GPUs are cut into them, and which models should go where.

Owns their requests and deadlines. It never reads a file: layouts and lists of models come as text.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.longrunning.operations_proto_pb2 import Operation

from hotbay.connection import Connection
from hotbay.request_ids import new_request_id
from hotbay.v1 import partition_pb2, partition_pb2_grpc, placement_pb2, placement_pb2_grpc

# A search over the whole node, on a host that may be busy serving.
PLACEMENT_TIMEOUT_S = 60.0


class LayoutCalls:
    """Part of `hotbay.client.Client`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._partitions = connection.stub(partition_pb2_grpc.PartitionServiceStub)
        self._placements = connection.stub(placement_pb2_grpc.PlacementServiceStub)

    def partitions(self) -> list[partition_pb2.Partition]:
        """All partitions, with the models on them."""
        pages = self._connection.pages(
            self._partitions.ListPartitions, partition_pb2.ListPartitionsRequest()
        )
        return [partition for page in pages for partition in page.partitions]

    def partition(self, partition_id: str) -> partition_pb2.Partition:
        """One partition. Raises NotFound."""
        request = partition_pb2.GetPartitionRequest(id=partition_id)
        partition: partition_pb2.Partition = self._connection.call(
            self._partitions.GetPartition, request
        )
        return partition

    def profiles(self) -> partition_pb2.ListProfilesResponse:
        """What each GPU can be cut into."""
        answer: partition_pb2.ListProfilesResponse = self._connection.call(
            self._partitions.ListProfiles, partition_pb2.ListProfilesRequest()
        )
        return answer

    def plan_layout(self, layout: str, *, source: str = "") -> partition_pb2.LayoutPlan:
        """What a layout file's text would change; `source` is what errors call it.

        Raises InvalidArgument, naming the line that must change.
        """
        request = partition_pb2.PlanLayoutRequest(layout=layout, source=source)
        plan: partition_pb2.LayoutPlan = self._connection.call(self._partitions.PlanLayout, request)
        return plan

    def apply_layout(
        self,
        plan_id: str,
        *,
        force: bool = False,
        end_pids: Sequence[int] = (),
        request_id: str = "",
        validate_only: bool = False,
    ) -> Operation:
        """Carry out a plan that `plan_layout` answered; the response is an ApplyLayoutResponse.

        With `force` processes of others in its way are ended: `end_pids`, and if there are more it
        is refused, or whichever there are. Raises Conflict (PLAN_STALE) when the GPUs have changed
        since.
        """
        request = partition_pb2.ApplyLayoutRequest(
            plan_id=plan_id,
            force=force,
            end_pids=end_pids,
            request_id=request_id or new_request_id(),
            validate_only=validate_only,
        )
        return self._connection.call(self._partitions.ApplyLayout, request)

    def plan_placement(self, models: str, *, source: str = "") -> placement_pb2.PlacementPlan:
        """A layout and a place for each model of a models file, as far as there is one.

        `source` is what errors call the file. Raises InvalidArgument, naming the line.
        """
        request = placement_pb2.PlanPlacementRequest(models=models, source=source)
        answer: placement_pb2.PlacementPlan = self._connection.call(
            self._placements.PlanPlacement, request, timeout_s=PLACEMENT_TIMEOUT_S
        )
        return answer

    def plan_defragmentation(
        self, *, worth_ms_per_gib: float = 0.0
    ) -> placement_pb2.DefragmentationPlan:
        """Which partitions are worth moving; its plan is applied by `apply_layout`.

        `worth_ms_per_gib` is how long a model may be away for each GiB that becomes of use.
        """
        request = placement_pb2.PlanDefragmentationRequest(worth_ms_per_gib=worth_ms_per_gib)
        answer: placement_pb2.DefragmentationPlan = self._connection.call(
            self._placements.PlanDefragmentation, request, timeout_s=PLACEMENT_TIMEOUT_S
        )
        return answer

    def layout(self) -> str:
        """The present layout as a file; planning that file changes nothing."""
        answer: partition_pb2.Layout = self._connection.call(
            self._partitions.GetLayout, partition_pb2.GetLayoutRequest()
        )
        return answer.text
