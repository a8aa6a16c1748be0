"""hotbay.v1.SimulationService: trouble for a simulated driver, by call.

It turns messages into the words of `partitioner.simulated.trouble`. It is offered by daemons on a
simulated node alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hotbay.v1 import simulation_pb2 as api

from daemon.control.errors import Refused
from partitioner.errors import SimulationError
from partitioner.simulated import trouble
from partitioner.simulated.node import SimulatedNode

FIELDS = (
    "uncorrected_errors",
    "rows_pending",
    "rows_failed",
    "thermal_slowdown",
    "power_slowdown",
)


class SimulationService:
    """Puts trouble upon a node; `changed` is told that there is some more, or none any more."""

    def __init__(self, node: SimulatedNode, changed: Callable[[], None]) -> None:
        self._node = node
        self._changed = changed

    async def Inject(self, request: api.InjectRequest) -> api.InjectResponse:
        try:
            message = self._inject(request)
        except SimulationError as error:
            raise Refused(str(error), reason="INVALID_ARGUMENT") from error
        self._changed()
        return api.InjectResponse(message=message)

    async def Clear(self, request: api.ClearRequest) -> api.ClearResponse:
        self._node.clear_injections()
        self._changed()
        return api.ClearResponse()

    def _inject(self, request: api.InjectRequest) -> str:
        node, target = self._node, request.target
        match request.WhichOneof("trouble"):
            case "xid":
                return trouble.report_xid(node, target, request.xid.number)
            case "vanish":
                return trouble.vanish(node, target)
            case "failure":
                failure = request.failure
                return trouble.fail_calls(
                    node,
                    target,
                    failure.function,
                    failure.error,
                    failure.after_calls,
                    failure.times,
                )
            case "delay":
                return trouble.delay_calls(node, request.delay.function, request.delay.delay_s)
            case "fields":
                return self._set_fields(target, request.fields)
            case "pending_reset":
                return trouble.want_reset(node, target)
        raise SimulationError("say which trouble")

    def _set_fields(self, target: str, fields: Any) -> str:
        changes: dict[str, Any] = {
            name: getattr(fields, name) for name in FIELDS if fields.HasField(name)
        }
        action = fields.recovery_action if fields.HasField("recovery_action") else None
        return trouble.set_health(self._node, target, action, changes)
