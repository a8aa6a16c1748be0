"""What stands in the way of a change of layout, and its removal when somebody insists.

It owns the rule: only what the change takes away is cleared, only of processes that are not ours,
and, where the caller has named some, of no others. It signals nothing itself. The invariant: who is
to be ended is known, named and allowed before anybody is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from daemon.control.actions.layout_errors import refusal
from daemon.control.errors import Refused
from daemon.control.processes.holders import Holder, Holders
from partitioner.cutting import LayoutChange
from partitioner.errors import PartitionerError
from partitioner.executor import Executor

HOLDERS_MAX = 64

log = logging.getLogger(__name__)


class Forcing:
    """Looks for the processes of others by `executor`, and ends them by `holders`."""

    def __init__(self, executor: Executor, holders: Holders) -> None:
        self._executor = executor
        self._holders = holders

    async def look(
        self, change: LayoutChange, own_pids: frozenset[int], allowed: Iterable[int]
    ) -> tuple[Holder, ...]:
        """Who would be ended; `allowed` are the only ones that may be, or none: all of them may.

        Raises Refused (PARTITION_IN_USE) naming those that may not.
        """
        try:
            found = await self._executor.holders(change, own_pids)
        except PartitionerError as error:
            raise refusal(error) from error
        may = frozenset(allowed)
        new = sorted(set(found) - may) if may else []
        if new or len(found) > HOLDERS_MAX:
            pids = new or sorted(found)
            problem = "not among those that may be ended" if new else f"more than {HOLDERS_MAX}"
            raise Refused(
                f"what is to go is used by processes that are {problem} (pid "
                f"{', '.join(map(str, pids))}): look at the list again, then apply again",
                reason="PARTITION_IN_USE",
                metadata={"pids": ",".join(map(str, pids))},
            )
        return tuple(self._holders.describe(pid, where) for pid, where in sorted(found.items()))

    def noted(self, change: LayoutChange, holders: tuple[Holder, ...]) -> LayoutChange:
        """The change, as journalled before anybody is ended for it."""
        words = (f"pid {each.pid} on {each.where} ({each.command})" for each in holders)
        return replace(change, ending=tuple(words))

    async def end(self, holders: tuple[Holder, ...]) -> None:
        """End them. Raises Refused naming who is left."""
        for each in holders:
            log.warning(
                "ending pid %d on %s (%s): %s", each.pid, each.where, each.owner, each.command
            )
        await self._holders.end(holders)
