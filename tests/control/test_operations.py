"""Operations over a real journal: idempotency, claims, cancelling, history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from daemon.control.config import Limits
from daemon.control.errors import JournalFailed, Refused
from daemon.control.state.journal import Journal, Put
from daemon.control.state.operations import Operations
from daemon.control.state.records import (
    Cause,
    Intent,
    Kind,
    Operation,
    Placement,
    Plan,
    Result,
    Stage,
)
from daemon.control.state.running import Handle, Outcome, Request

LOAD = Intent(Kind.LOAD, incoming="prose@1")
DEMAND = Intent(Kind.SWAP, Cause.DEMAND, incoming="code@1")


class Bench:
    """Operations, and runs that wait until they are let go."""

    def __init__(self, operations: Operations, seen: list[Operation]) -> None:
        self.operations = operations
        self.seen = seen
        self.gate = asyncio.Event()
        self.started: list[str] = []

    async def run(self, handle: Handle) -> Outcome:
        self.started.append(handle.name)
        await self.gate.wait()
        return Outcome(Result("prose@1", "ACTIVE"), (Put(Placement("prose@1", "gpu0")),))

    async def begin(
        self,
        request: Request | None = None,
        intent: Intent = LOAD,
        claims: tuple[str, ...] = ("partition:gpu0",),
        run: Callable[[Handle], Awaitable[Outcome]] | None = None,
    ) -> Operation:
        request = request or Request("LoadModel")
        return await self.operations.begin(request, intent, Plan(), claims, run or self.run)


@asynccontextmanager
async def bench(directory: Path, **limits: float) -> AsyncIterator[Bench]:
    journal, contents = await Journal.open(directory)
    seen: list[Operation] = []
    operations = Operations(journal, Limits(**limits), seen.append)  # type: ignore[arg-type]
    operations.restore(contents.operations)
    try:
        yield Bench(operations, seen)
    finally:
        await operations.stop()
        await journal.close()


def play(directory: Path, scenario: Callable[[Bench], Awaitable[None]], **limits: float) -> None:
    async def main() -> None:
        async with bench(directory, **limits) as stage, asyncio.timeout(120):
            await scenario(stage)

    asyncio.run(main())


def test_end_and_effects_are_one_transaction(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        operation = await stage.begin()
        assert not operation.done
        stage.gate.set()
        operation = await stage.operations.wait(operation.name, 5)
        assert operation.stage is Stage.COMMITTED
        assert [each.done for each in stage.seen] == [False, True]

    play(tmp_path, scenario)

    async def look() -> None:
        journal, contents = await Journal.open(tmp_path)
        await journal.close()
        assert contents.placements == (Placement("prose@1", "gpu0"),)
        assert contents.operations[0].result == Result("prose@1", "ACTIVE")

    asyncio.run(look())


def test_same_request_gives_the_same_operation_now_and_after_a_restart(tmp_path: Path) -> None:
    request = Request("LoadModel", "id-1", "hash-a")
    names = []

    async def first(stage: Bench) -> None:
        both = await asyncio.gather(stage.begin(request), stage.begin(request))
        assert both[0].name == both[1].name
        stage.gate.set()
        names.append((await stage.operations.wait(both[0].name, 5)).name)
        assert (await stage.begin(request)).done

    async def second(stage: Bench) -> None:
        operation = await stage.begin(request)
        assert (operation.name, operation.done) == (names[0], True)
        assert stage.started == []
        for other in (Request("LoadModel", "id-1", "hash-b"), Request("Swap", "id-1", "hash-a")):
            with pytest.raises(Refused) as refused:
                await stage.begin(other)
            assert refused.value.reason == "REQUEST_ID_REUSED"
            assert refused.value.metadata["operation"] == names[0]

    play(tmp_path, first)
    play(tmp_path, second)


def test_nothing_runs_that_could_not_be_written(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        await stage.operations._journal.close()
        with pytest.raises(JournalFailed):
            await stage.begin(Request("LoadModel", "id-1", "h"))
        assert stage.started == []
        assert stage.operations.holder("partition:gpu0") is None
        assert stage.operations.all() == []

    play(tmp_path, scenario)


def test_second_call_on_a_partition_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        held = await stage.begin()
        with pytest.raises(Refused) as refused:
            await stage.begin()
        assert refused.value.reason == "OPERATION_IN_PROGRESS"
        assert refused.value.metadata == {
            "operation": held.name,
            "resource": "partition:gpu0",
        }
        elsewhere = await stage.begin(claims=("partition:gpu1",))
        await asyncio.sleep(0.01)
        assert stage.started == [held.name, elsewhere.name]

    play(tmp_path, scenario)


def test_demand_stands_in_line_and_calls_stand_behind_demand(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        order = []

        async def note(handle: Handle) -> Outcome:
            order.append(handle.record.intent.cause)
            return await stage.run(handle)

        first = await stage.begin(run=note)
        demand = [await stage.begin(intent=DEMAND, run=note) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert order == [Cause.API]
        assert stage.operations.get(demand[0].name).stage is Stage.QUEUED
        stage.gate.set()
        await stage.operations.wait(first.name, 5)
        last = await stage.begin(run=note)
        await stage.operations.wait(last.name, 5)
        assert order == [Cause.API, Cause.DEMAND, Cause.DEMAND, Cause.API]

    play(tmp_path, scenario)


def test_overlapping_claims_never_deadlock(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        stage.gate.set()
        keys = ["a", "b", "c"]
        names = []
        for number in range(30):
            claims = (keys[number % 3], keys[(number + 1 + number % 2) % 3])
            names.append((await stage.begin(intent=DEMAND, claims=claims)).name)
        for name in names:
            assert (await stage.operations.wait(name, 5)).done
        assert stage.started == names

    play(tmp_path, scenario)


def test_failures_and_bugs_end_the_operation_with_a_reason(tmp_path: Path) -> None:
    async def fail(handle: Handle) -> Outcome:
        raise Refused("no room", reason="INSUFFICIENT_DEVICE_MEMORY", metadata={"needed": "7"})

    async def bug(handle: Handle) -> Outcome:
        raise KeyError("oops")

    async def scenario(stage: Bench) -> None:
        for run, reason in ((fail, "INSUFFICIENT_DEVICE_MEMORY"), (bug, "INTERNAL")):
            operation = await stage.begin(run=run)
            operation = await stage.operations.wait(operation.name, 5)
            assert operation.failure is not None
            assert operation.failure.reason == reason
            assert operation.stage is Stage.ROLLED_BACK
        assert stage.operations.holder("partition:gpu0") is None

    play(tmp_path, scenario)


def test_cancel_before_and_after_the_point_of_no_return(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        operation = await stage.begin()
        await asyncio.sleep(0.01)
        await stage.operations.cancel(operation.name)
        operation = await stage.operations.wait(operation.name, 5)
        assert operation.failure is not None
        assert operation.failure.reason == "CANCELLED"

        committed = asyncio.Event()

        async def late(handle: Handle) -> Outcome:
            handle.update(stage=Stage.COMMITTED)
            committed.set()
            return await stage.run(handle)

        operation = await stage.begin(run=late)
        await committed.wait()
        with pytest.raises(Refused) as refused:
            await stage.operations.cancel(operation.name)
        assert refused.value.reason == "NOT_CANCELLABLE"

    play(tmp_path, scenario)


def test_cancel_in_line_frees_the_line(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        first = await stage.begin()
        queued = await stage.begin(intent=DEMAND)
        last = await stage.begin(intent=DEMAND)
        await stage.operations.cancel(queued.name)
        stage.gate.set()
        for name in (first.name, last.name):
            assert (await stage.operations.wait(name, 5)).failure is None
        assert queued.name not in stage.started

    play(tmp_path, scenario)


def test_abandoning_is_asked_of_whoever_can(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        asked = []

        async def abandon() -> None:
            asked.append(True)
            stage.gate.set()

        async def run(handle: Handle) -> Outcome:
            handle.cancel_by(abandon)
            await stage.gate.wait()
            raise Refused("rolled back", reason="EXCHANGE_FAILED")

        operation = await stage.begin(run=run)
        await asyncio.sleep(0.01)
        await stage.operations.cancel(operation.name)
        await stage.operations.cancel(operation.name)
        operation = await stage.operations.wait(operation.name, 5)
        assert asked == [True]
        assert operation.failure is not None
        assert operation.failure.reason == "CANCELLED"

    play(tmp_path, scenario)


def test_stopping_leaves_operations_open_for_the_next_start(tmp_path: Path) -> None:
    names = []

    async def first(stage: Bench) -> None:
        names.append((await stage.begin()).name)
        await asyncio.sleep(0.01)

    async def second(stage: Bench) -> None:
        (record,) = stage.operations.all()
        assert (record.name, record.done) == (names[0], False)
        stage.gate.set()
        stage.operations.readopt(record, ("partition:gpu0",), stage.run)
        assert (await stage.operations.wait(record.name, 5)).done

    play(tmp_path, first)
    play(tmp_path, second)


def test_history_is_bounded_and_can_be_deleted(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        stage.gate.set()
        names = []
        for _ in range(15):
            names.append((await stage.begin()).name)
            await stage.operations.wait(names[-1], 5)
        kept = [each.name for each in stage.operations.all()]
        assert len(kept) <= 11
        assert kept[0] == names[-1]
        await stage.operations.delete(names[-1])
        with pytest.raises(Refused) as refused:
            stage.operations.get(names[-1])
        assert refused.value.reason == "OPERATION_NOT_FOUND"
        stage.gate.clear()
        running = await stage.begin()
        with pytest.raises(Refused, match="under way"):
            await stage.operations.delete(running.name)

    play(tmp_path, scenario, operations_kept_max=10)


def test_open_operations_are_bounded(tmp_path: Path) -> None:
    async def scenario(stage: Bench) -> None:
        await stage.begin(claims=("a",))
        await stage.begin(claims=("b",))
        with pytest.raises(Refused) as refused:
            await stage.begin(claims=("c",))
        assert refused.value.reason == "QUEUE_FULL"

    play(tmp_path, scenario, operations_open_max=2)


def test_progress_is_told_at_once_on_a_new_stage_and_rarely_within_one(tmp_path: Path) -> None:
    async def busy(handle: Handle) -> Outcome:
        for stage in (Stage.BUILDING, Stage.COPYING):
            for done in range(100):
                handle.update(stage=stage, bytes_done=done)
        return Outcome(Result("prose@1", "ACTIVE"))

    async def scenario(stage: Bench) -> None:
        operation = await stage.begin(run=busy)
        operation = await stage.operations.wait(operation.name, 5)
        assert operation.bytes_done == 99
        stages = [each.stage for each in stage.seen]
        assert stages[0] is Stage.QUEUED
        assert {Stage.BUILDING, Stage.COPYING} <= set(stages)
        assert len(stages) < 10

    play(tmp_path, scenario)
