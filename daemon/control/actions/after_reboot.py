"""After the host was started: the layout that was applied before it, applied again.

It owns that one operation of a start, and the policy of it. Instances do not outlive a reboot, so
what was ours then is read from the journal, planned like a layout file, and applied like one: by an
operation that can be watched, that drains and rolls back as any other. It takes nothing over and
destroys nothing of others. The invariant: it is tried once in each start until it has succeeded, or
somebody has applied another layout; what was not applied is named among the node's warnings.
"""

from __future__ import annotations

import logging

from daemon.control.actions.layout_changes import LayoutChanges
from daemon.control.actions.layouts import Layouts
from daemon.control.config import AfterReboot
from daemon.control.errors import ControlError
from daemon.control.notify import boot_id
from daemon.control.state.journal import Journal, Put
from daemon.control.state.operations import Operations
from daemon.control.state.records import Cause, KeptLayout
from daemon.control.state.running import Request
from daemon.control.state.world import World

METHOD = "AfterReboot"
SOURCE = "the layout of before the host was started"

log = logging.getLogger(__name__)


class Reapplying:
    """Applies `kept`, what the journal held at start, if it is of another boot."""

    def __init__(
        self,
        world: World,
        layouts: Layouts,
        changes: LayoutChanges,
        journal: Journal,
        operations: Operations,
    ) -> None:
        self._world = world
        self._layouts = layouts
        self._changes = changes
        self._journal = journal
        self._operations = operations

    async def run(self, kept: KeptLayout | None, policy: AfterReboot) -> None:
        """Once the node is ready. Never raises but for a bug."""
        if kept is None:
            return
        self._world.owners = dict(kept.owners)
        if not kept.text or kept.boot_id == boot_id():
            return
        try:
            problem = await self._apply(kept, policy)
        except ControlError as error:
            problem = str(error)
        if problem:
            log.warning("%s is not applied again: %s", SOURCE, problem)
            self._world.warnings.append(f"{SOURCE} is not applied again: {problem}")
        else:
            self._changes.forget_gone()

    async def _apply(self, kept: KeptLayout, policy: AfterReboot) -> str:
        """Why it is not there again; empty when it is."""
        plan = await self._layouts.plan(kept.text, SOURCE)
        if not plan.changes:
            await self._journal.commit([Put(KeptLayout(kept.text, boot_id(), kept.owners))])
            return ""
        by_hand = f"gpuctl part apply {plan.plan_id}"
        if policy == "wait":
            return f"[partitions] after_reboot is `wait`: `{by_hand}`"
        log.info("applying %s again, as %s", SOURCE, plan.plan_id)
        request = Request(METHOD)
        begun = await self._changes.apply(
            request, plan.plan_id, validate_only=False, cause=Cause.RECOVERY
        )
        ended = await self._operations.wait(begun.name, None)
        if ended.failure is None:
            return ""
        return f"{ended.failure.message} ({begun.name}); it is tried again when hotbayd starts"
