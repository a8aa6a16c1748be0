"""Cordoning a GPU: by an operator's word nothing new comes upon it, until he takes the word back.

It owns the two operations and their journalled record. It takes nothing off the GPU. The invariant:
the word is in the journal before it is answered, and a cordon that is there already stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from daemon.control.state.closures import find_gpu
from daemon.control.state.failures import Failed
from daemon.control.state.journal import Drop, Put
from daemon.control.state.operations import Operations
from daemon.control.state.records import Cordon, Intent, Kind, Plan, Result
from daemon.control.state.running import Handle, Outcome, Request, Run
from daemon.control.state.world import World
from partitioner.gpu import Gpu


class Cordons:
    """`uncordoned` is told of each GPU that an operator says is fit again."""

    def __init__(
        self, world: World, operations: Operations, uncordoned: Callable[[str], None]
    ) -> None:
        self._world = world
        self._operations = operations
        self._uncordoned = uncordoned

    async def cordon(self, request: Request, text: str, reason: str, *, only_check: bool) -> Gpu:
        """Let nothing new come upon a GPU. Raises Refused (GPU_NOT_FOUND)."""
        gpu = find_gpu(self._world.gpus, text)
        closures = self._world.closures

        async def run(handle: Handle) -> Outcome:
            cordon = closures.cordons.get(gpu.uuid) or Cordon(gpu.uuid, reason, time.time())
            closures.cordons[gpu.uuid] = cordon
            return Outcome(_result(gpu, "is cordoned"), (Put(cordon),))

        if not only_check:
            await self._carry_out(request, gpu, Kind.CORDON, run)
        return gpu

    async def uncordon(self, request: Request, text: str, *, only_check: bool) -> Gpu:
        """Take the word back. Raises Refused (GPU_NOT_FOUND)."""
        gpu = find_gpu(self._world.gpus, text)
        closures = self._world.closures

        async def run(handle: Handle) -> Outcome:
            cordon = closures.cordons.pop(gpu.uuid, None)
            self._uncordoned(gpu.uuid)
            changes = (Drop(cordon),) if cordon is not None else ()
            return Outcome(_result(gpu, "takes models again"), changes)

        if not only_check:
            await self._carry_out(request, gpu, Kind.UNCORDON, run)
        return gpu

    async def _carry_out(self, request: Request, gpu: Gpu, kind: Kind, run: Run) -> None:
        operation = await self._operations.begin(
            request, Intent(kind), Plan(), (f"cordon:{gpu.uuid}",), run
        )
        operation = await self._operations.wait(operation.name, None)
        if operation.failure is not None:
            raise Failed(operation.failure)


def _result(gpu: Gpu, what: str) -> Result:
    return Result("", "UNSPECIFIED", message=f"gpu{gpu.index} {what}")
