"""Operations: durable, idempotent, one at a time for each thing they change.

It owns every operation's record, task and claims. A record is on disk before its task runs, and its
end is on disk together with what it changed before anyone is told. It never knows what a load or a
swap does: that is the `run` it is given. The invariant: of the operations that claim the same
partition or model exactly one runs; a second one by call is refused and told who holds it
unless it asked to be queued; it stands in line then, in the order of coming, as those brought about
by demand or recovery do.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from daemon.control.config import Limits
from daemon.control.errors import ControlError, Refused
from daemon.control.state.failures import failure_of
from daemon.control.state.journal import Drop, Journal, Put
from daemon.control.state.records import Cause, Failure, Intent, Operation, Plan, Stage
from daemon.control.state.running import Handle, Live, Request, Run
from engine.link.control import Ledger

NAME_PREFIX = "operations/"
REQUEST_ID_CHARACTERS_MAX = 128

log = logging.getLogger(__name__)


class Operations:
    """All operations that are remembered. Not thread-safe: for the daemon's event loop."""

    def __init__(
        self,
        journal: Journal,
        limits: Limits,
        notify: Callable[[Operation], None],
        forgotten: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._journal = journal
        self._limits = limits
        self._notify = notify
        self._forgotten = forgotten
        self._all: dict[str, Live] = {}
        self._by_request: dict[str, Live] = {}
        self._lines: dict[str, deque[Live]] = {}
        self._moved = asyncio.Event()
        self._stopping = False

    # Beginning.

    async def replay(self, request: Request) -> Operation | None:
        """The operation an earlier call with this request id began, if there was one.

        Raises Refused (REQUEST_ID_REUSED) when that call was another one.
        """
        if len(request.request_id) > REQUEST_ID_CHARACTERS_MAX:
            raise Refused(
                f"request_id has {len(request.request_id)} characters; at most "
                f"{REQUEST_ID_CHARACTERS_MAX} are allowed",
                reason="INVALID_ARGUMENT",
                metadata={"field": "request_id"},
            )
        live = self._by_request.get(request.request_id) if request.request_id else None
        if live is None:
            return None
        record = live.record
        if (record.method, record.request_hash) != (request.method, request.request_hash):
            raise Refused(
                f"request_id {request.request_id!r} was used for {record.name} ({record.method}) "
                "with another request: repeat that request, or take a new id",
                reason="REQUEST_ID_REUSED",
                metadata={"request_id": request.request_id, "operation": record.name},
            )
        await live.durable.wait()
        if live.refused is not None:
            raise live.refused
        return live.record

    async def begin(
        self, request: Request, intent: Intent, plan: Plan, claims: Iterable[str], run: Run
    ) -> Operation:
        """Write the operation down and start it. Answers the same as before for a repeated id.

        Raises Refused (OPERATION_IN_PROGRESS, QUEUE_FULL) or JournalFailed, having begun
        nothing.
        """
        existing = await self.replay(request)
        if existing is not None:
            return existing
        claimed = tuple(claims)
        self._admit(intent, claimed)
        identity = secrets.token_hex(8)
        record = Operation(
            name=NAME_PREFIX + identity,
            request_id=request.request_id or identity,
            method=request.method,
            request_hash=request.request_hash,
            intent=intent,
            created_s=time.time(),
            plan=plan,
        )
        live = Live(record, claimed)
        self._enter(live)
        try:
            await self._journal.commit([Put(record)])
        except BaseException as error:
            live.refused = error if isinstance(error, ControlError) else Refused(str(error))
            self._leave(live)
            self._forget(live)
            live.durable.set()
            raise
        self._launch(live, run)
        return live.record

    def readopt(self, record: Operation, claims: Iterable[str], run: Run) -> None:
        """Go on with an open operation of an earlier start; `run` finds out how it ended."""
        self._forget(self._all[record.name])
        live = Live(record, tuple(claims))
        self._enter(live)
        self._launch(live, run)

    def restore(self, records: Iterable[Operation]) -> tuple[Operation, ...]:
        """Take in what the journal holds; returns those that are still open."""
        for record in records:
            live = Live(record)
            live.durable.set()
            if record.done:
                live.done.set()
            self._all[record.name] = live
            self._by_request[record.request_id] = live
        return tuple(live.record for live in self._all.values() if not live.record.done)

    # Asking.

    def get(self, name: str) -> Operation:
        """Raises Refused (OPERATION_NOT_FOUND)."""
        return self._find(name).record

    def all(self) -> list[Operation]:
        """Every remembered operation, newest first."""
        records = [live.record for live in self._all.values()]
        return sorted(records, key=lambda record: (record.created_s, record.name), reverse=True)

    def holder(self, claim: str) -> Operation | None:
        """Who holds a partition or model, or is first in line for it."""
        line = self._lines.get(claim)
        return line[0].record if line else None

    @property
    def open_count(self) -> int:
        return sum(not live.record.done for live in self._all.values())

    async def wait(self, name: str, timeout_s: float | None) -> Operation:
        """The operation once it is done, or as it is after `timeout_s`."""
        live = self._find(name)
        try:
            async with asyncio.timeout(timeout_s):
                await live.done.wait()
        except TimeoutError:
            return live.record
        return live.record

    # Ending.

    async def cancel(self, name: str) -> None:
        """Ask for a rollback. Raises Refused (NOT_CANCELLABLE) when it is too late."""
        live = self._find(name)
        record = live.record
        if record.done or record.stage is Stage.COMMITTED:
            raise Refused(
                f"{name} is {'done' if record.done else 'committed'} and cannot be cancelled; "
                "swap or load again to go back",
                reason="NOT_CANCELLABLE",
                metadata={"operation": name, "stage": record.stage.value},
            )
        if live.cancelling or live.task is None:
            return
        live.cancelling = True
        if live.abandon is not None:
            try:
                await live.abandon()
            except ControlError:
                live.cancelling = False  # it was too late; the operation goes on
                raise
        else:
            live.task.cancel()

    async def complete_ledger(self, name: str, ledger: Ledger) -> Operation | None:
        """Add the first token, which came after the end, to a finished operation's ledger.

        Returns the operation as it is now; None when there is nothing to add or to add it to.
        """
        live = self._all.get(name)
        result = live.record.result if live is not None else None
        if live is None or result is None or result.ledger is None or ledger.first_token_ms is None:
            return None
        if result.ledger.first_token_ms is not None:
            return None
        result = msgspec.structs.replace(result, ledger=ledger)
        live.record = msgspec.structs.replace(live.record, result=result)
        await self._journal.commit([Put(live.record)])
        return live.record

    async def delete(self, name: str) -> None:
        """Forget a finished operation. Raises Refused (INVALID_STATE) while it is open."""
        live = self._find(name)
        if not live.record.done:
            raise Refused(
                f"{name} is still under way: cancel it first",
                reason="INVALID_STATE",
                metadata={"operation": name},
            )
        await self._journal.commit([Drop(live.record)])
        self._forget(live)
        self._forgotten(live.record.name)

    async def stop(self) -> None:
        """End what runs, without a verdict: the next start finds these open and settles them."""
        self._stopping = True
        tasks = [live.task for live in self._all.values() if live.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Inside.

    def _find(self, name: str) -> Live:
        live = self._all.get(name) or self._all.get(NAME_PREFIX + name)
        if live is None:
            raise Refused(
                f"there is no operation {name!r}: it was never begun, was deleted, or is older "
                "than what is kept",
                reason="OPERATION_NOT_FOUND",
                metadata={"operation": name},
            )
        return live

    def _admit(self, intent: Intent, claims: tuple[str, ...]) -> None:
        if self._stopping:
            raise Refused("the daemon is stopping", reason="DAEMON_DRAINING")
        if self.open_count >= self._limits.operations_open_max:
            raise Refused(
                f"{self._limits.operations_open_max} operations are open already "
                "(limits.operations_open_max): wait for some to end",
                reason="QUEUE_FULL",
                metadata={"limit": str(self._limits.operations_open_max)},
            )
        if intent.cause is not Cause.API or intent.queue:
            return
        for claim in claims:
            for live in self._lines.get(claim, ()):
                held = live.record
                if held.intent.cause is Cause.API:
                    raise Refused(
                        f"{claim.replace(':', ' ')} is being changed by {held.name} "
                        f"({held.intent.kind.value}, {held.stage.value}): wait for it or cancel it",
                        reason="OPERATION_IN_PROGRESS",
                        metadata={"operation": held.name, "resource": claim},
                    )

    def _enter(self, live: Live) -> None:
        self._all[live.record.name] = live
        self._by_request[live.record.request_id] = live
        for claim in live.claims:
            self._lines.setdefault(claim, deque()).append(live)

    def _leave(self, live: Live) -> None:
        for claim in live.claims:
            line = self._lines[claim]
            line.remove(live)
            if not line:
                del self._lines[claim]
        self._moved.set()
        self._moved = asyncio.Event()

    def _forget(self, live: Live) -> None:
        self._all.pop(live.record.name, None)
        if self._by_request.get(live.record.request_id) is live:
            del self._by_request[live.record.request_id]

    def _launch(self, live: Live, run: Run) -> None:
        live.durable.set()
        live.task = asyncio.create_task(self._run(live, run), name=live.record.name)
        self._notify(live.record)

    async def _run(self, live: Live, run: Run) -> None:
        handle = Handle(live, self._notify)
        changes: tuple[Put | Drop, ...] = ()
        try:
            while any(self._lines[claim][0] is not live for claim in live.claims):
                await self._moved.wait()
            outcome = await run(handle)
            changes = outcome.changes
            ended = {"result": outcome.result, "stage": Stage.COMMITTED}
        except asyncio.CancelledError:
            if self._stopping or not live.cancelling:
                self._leave(live)
                raise
            ended = {"failure": _cancelled(live.record), "stage": Stage.ROLLED_BACK}
        except Exception as error:  # the boundary: every failure becomes the operation's verdict
            failure = failure_of(error)
            if live.cancelling and failure.reason != "LAYOUT_UNSETTLED":
                failure = _cancelled(live.record)
            if failure.reason == "INTERNAL":
                log.exception("%s failed", live.record.name)
            unsettled = failure.reason == "LAYOUT_UNSETTLED"
            stage = Stage.ROLLING_BACK if unsettled else Stage.ROLLED_BACK
            ended = {"failure": failure, "stage": stage}
        live.record = msgspec.structs.replace(live.record, ended_s=time.time(), **ended)
        try:
            await self._journal.commit([Put(live.record), *changes, *self._trim()])
        except ControlError as error:
            # What happened, happened: the next start reads it from the workers.
            log.error("the end of %s could not be written: %s", live.record.name, error)
        self._leave(live)
        live.done.set()
        self._notify(live.record)

    def _trim(self) -> list[Drop]:
        """Forget finished operations that are too old or too many, oldest first."""
        finished = sorted(
            (live for live in self._all.values() if live.record.done and live.done.is_set()),
            key=lambda live: live.record.ended_s,
        )
        surplus = len(finished) - self._limits.operations_kept_max
        oldest_s = time.time() - self._limits.operation_history_s
        dropped = [
            live
            for index, live in enumerate(finished)
            if index < surplus or live.record.ended_s < oldest_s
        ]
        for live in dropped:
            self._forget(live)
            self._forgotten(live.record.name)
        return [Drop(live.record) for live in dropped]


def _cancelled(record: Operation) -> Failure:
    return Failure(
        "CANCELLED",
        f"{record.name} was cancelled at stage {record.stage.value} and rolled back",
        {"operation": record.name, "stage": record.stage.value},
    )
