"""Models that are STAGED: weights on the device that nobody serves from, and that give way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.link import control
from engine.link.control import EngineState, EngineStatus, InFlight, Stage, StageWeights
from tests.support.worker_stage import (
    BuiltImage,
    GatewaySide,
    HotbaydSide,
    WorkerStage,
    greedy,
    load,
    worker_process,
)
from tests.worker.conftest import Model, serving

PAGE_BYTES = 2 << 20
PROMPT = [3, 1, 4, 1, 5, 9]
SLOW = ("--link-bytes-per-s", str(1 << 20))
"""A second for each MiB: what is being staged is still on its way when a test looks."""


def stage(model: Model, operation: str = "stage", *, displace: bool = False) -> StageWeights:
    spec = load(model.key, model.image).incoming
    assert spec is not None
    return StageWeights(operation=operation, incoming=spec, displace=displace)


async def staged(hotbayd: HotbaydSide, request: StageWeights) -> control.ExchangeResult:
    reply = await hotbayd.call(request)
    assert isinstance(reply, control.Exchanged), reply
    return reply.result


def engine(state: control.WorkerState, model: Model) -> EngineState:
    return next(one for one in state.engines if one.model == model.key)


def swap(operation: str, outgoing: Model, incoming: Model, **values: object) -> control.Exchange:
    return load(
        incoming.key,
        incoming.image,
        operation,
        outgoing=(outgoing.key,),
        keep_staged=True,
        **values,
    )


@asynccontextmanager
async def small(
    runtime_dir: Path, pages: int, *models: Model, arguments: tuple[str, ...] = ()
) -> AsyncIterator[tuple[WorkerStage, HotbaydSide, GatewaySide]]:
    """A worker of its own with so many pages, and images attached; nothing is loaded."""
    async with worker_process(runtime_dir, *arguments, memory_bytes=pages * PAGE_BYTES) as worker:
        hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
        for model in models:
            await hotbayd.attach(model.image)
        yield worker, hotbayd, gateway


def test_a_swap_to_a_staged_model_copies_nothing_and_neither_does_the_way_back(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            before = await hotbayd.describe()
            result = await staged(hotbayd, stage(code))
            assert (result.error, result.ledger.copied_bytes) == (
                "",
                code.image.manifest.weights_bytes,
            )
            state = await hotbayd.describe()
            waiting = engine(state, code)
            assert (waiting.status, waiting.spare, waiting.kv_bytes) == (
                EngineStatus.STAGED,
                True,
                0,
            )
            # The weights alone: KV is taken when it comes to serve.
            assert before.pages_free - state.pages_free == 1
            # Staging what is STAGED changes nothing, and a spare model is not a drained one.
            assert (await staged(hotbayd, stage(code, "again"))).ledger.copied_bytes == 0
            for message in (control.Resume(code.key), control.Drain(code.key)):
                assert (await hotbayd.failed(message)).reason == "INVALID_STATE"
            await gateway.stand_still(prose.key)
            stream = gateway.submit(prose.key, PROMPT, greedy(120))
            await gateway.begun(stream)
            there = await hotbayd.exchange(swap("there", prose, code, in_flight=InFlight.RECOMPUTE))
            gateway.flow()
            assert (there.error, there.ledger.copied_bytes, there.ledger.evicted_bytes) == (
                "",
                0,
                0,
            )
            assert there.ledger.requests_kept == 1
            answer = await gateway.run(code.key, PROMPT, greedy(20))
            assert answer.tokens == code.expected(PROMPT, 20)
            parked = engine(await hotbayd.describe(), prose)
            assert (parked.status, parked.spare, parked.waiting) == (EngineStatus.STAGED, True, 1)
            back = await hotbayd.exchange(swap("back", code, prose))
            assert (back.error, back.ledger.copied_bytes) == ("", 0)
            assert (await gateway.ended(stream)).tokens == prose.expected(PROMPT, 120)

    asyncio.run(run())


def test_an_outgoing_model_is_evicted_when_its_pages_are_needed(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        # Two pages: weights and KV of one model.
        async with small(runtime_dir, 2, prose, code) as (_, hotbayd, gateway):
            assert (await hotbayd.exchange(load(prose.key, prose.image))).error == ""
            refusal = await hotbayd.failed(stage(code, displace=True))
            assert refusal.reason == "INSUFFICIENT_DEVICE_MEMORY"
            assert refusal.metadata["needed_bytes"] == str(PAGE_BYTES)
            result = await hotbayd.exchange(swap("swap", prose, code))
            assert result.error == ""
            assert result.ledger.evicted_bytes == prose.image.manifest.weights_bytes
            state = await hotbayd.describe()
            assert (engine(state, prose).status, state.pages_free) == (EngineStatus.STANDBY, 0)
            answer = await gateway.run(code.key, PROMPT, greedy(8))
            assert answer.tokens == code.expected(PROMPT, 8)

    asyncio.run(run())


def test_staged_models_give_way_to_a_load_oldest_first_and_to_kv(
    runtime_dir: Path, prose: Model, code: Model, other: Model
) -> None:
    async def run() -> None:
        async with small(runtime_dir, 4, prose, code, other) as (_, hotbayd, gateway):
            for number, model in enumerate((prose, code)):
                assert (await staged(hotbayd, stage(model, f"s{number}"))).error == ""
            # Staged again: from now on code is the one that was unused for longest.
            assert (await staged(hotbayd, stage(prose, "s2"))).error == ""
            # Without `displace` nobody leaves for it; with it the oldest does.
            result = await hotbayd.exchange(load(other.key, other.image, "first"))
            assert result.error == ""
            state = await hotbayd.describe()
            assert state.pages_free == 0
            assert {one.status for one in state.engines if one.spare} == {EngineStatus.STAGED}
            unload = control.Exchange(operation="off", outgoing=(other.key,), discard=True)
            assert (await hotbayd.exchange(unload)).error == ""
            wide = load(other.key, other.image, "wide", context_tokens=256 * 16)
            assert (await hotbayd.exchange(wide)).error == ""
            kv_pages = engine(await hotbayd.describe(), other).kv_bytes // PAGE_BYTES
            assert kv_pages >= 2
            statuses = {one.model: one.status for one in (await hotbayd.describe()).engines}
            assert statuses[code.key] is EngineStatus.STANDBY
            answer = await gateway.run(other.key, PROMPT, greedy(8))
            assert answer.tokens == other.expected(PROMPT, 8)

    asyncio.run(run())


def test_kv_of_a_model_that_serves_takes_the_pages_of_staged_ones(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with small(runtime_dir, 3, prose, code) as (_, hotbayd, gateway):
            assert (await hotbayd.exchange(load(prose.key, prose.image))).error == ""
            assert (await staged(hotbayd, stage(code))).error == ""
            assert (await hotbayd.describe()).pages_free == 0
            # More tokens at once than one page of KV holds.
            streams = [
                gateway.submit(prose.key, [*PROMPT, number], greedy(200)) for number in range(24)
            ]
            for number, stream in enumerate(streams):
                answer = await gateway.ended(stream)
                assert answer.tokens == prose.expected([*PROMPT, number], 200)
            state = await hotbayd.describe()
            assert engine(state, code).status is EngineStatus.STANDBY
            # What went unasked can be staged again.
            assert (await staged(hotbayd, stage(code, "again"))).error == ""

    asyncio.run(run())


def test_what_is_being_staged_gives_way_and_stands_still_while_an_exchange_runs(
    runtime_dir: Path, prose: Model, code: Model, other: Model
) -> None:
    async def run() -> None:
        # The first staging is on its way for as long as nobody ends it.
        arguments = ("--failpoints", "staging=hang", "--link-bytes-per-s", str(4 << 20))
        async with small(runtime_dir, 4, prose, code, other, arguments=arguments) as (
            _,
            hotbayd,
            gateway,
        ):
            assert (await hotbayd.exchange(load(prose.key, prose.image))).error == ""
            staging = asyncio.create_task(staged(hotbayd, stage(code)))
            await hotbayd.stage("stage", Stage.COPYING)
            refusal = await hotbayd.failed(stage(other, "second"))
            assert refusal.reason == "OPERATION_IN_PROGRESS"
            # It needs two pages, one of which is being filled.
            result = await hotbayd.exchange(load(other.key, other.image, "beside"))
            assert result.error == ""
            given_up = await staging
            assert (given_up.error_reason, given_up.rolled_back) == (
                "INSUFFICIENT_DEVICE_MEMORY",
                True,
            )
            assert "stage it again" in given_up.error
            state = await hotbayd.describe()
            assert (engine(state, code).status, state.pages_free) == (EngineStatus.STANDBY, 0)
            for model in (prose, other):
                answer = await gateway.run(model.key, PROMPT, greedy(8))
                assert answer.tokens == model.expected(PROMPT, 8)
            # Where there is room it only waits.
            unload = control.Exchange(operation="off", outgoing=(prose.key,), discard=True)
            assert (await hotbayd.exchange(unload)).error == ""
            staging = asyncio.create_task(staged(hotbayd, stage(code, "later")))
            await hotbayd.stage("later", Stage.COPYING)
            off = control.Exchange(operation="off2", outgoing=(other.key,), discard=True)
            assert (await hotbayd.exchange(off)).error == ""
            assert (await staging).error == ""
            assert engine(await hotbayd.describe(), code).status is EngineStatus.STAGED

    asyncio.run(run())


def test_staging_can_be_abandoned_and_its_image_taken_away(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with small(runtime_dir, 6, prose, code, arguments=SLOW) as (_, hotbayd, gateway):
            missing = load("none@1", BuiltImage(prose.image.segment, prose.image.manifest))
            assert missing.incoming is not None
            staging = asyncio.create_task(staged(hotbayd, stage(prose)))
            await hotbayd.stage("stage", Stage.COPYING)
            await hotbayd.done(control.Abandon("stage"))
            assert (await staging).error_reason == "CANCELLED"
            staging = asyncio.create_task(staged(hotbayd, stage(prose, "before")))
            await hotbayd.stage("before", Stage.COPYING)
            measured = await hotbayd.call(control.MeasureLink(copy_bytes=1 << 16))
            assert measured.link_bytes_per_s == pytest.approx(1 << 20, rel=0.1)
            assert "measure the link" in (await staging).error
            state = await hotbayd.describe()
            assert state.pages_free == state.pages_total
            staging = asyncio.create_task(staged(hotbayd, stage(prose, "again")))
            await hotbayd.stage("again", Stage.COPYING)
            await hotbayd.done(control.DetachImage(prose.image.digest))
            assert (await staging).error_reason == "INSUFFICIENT_DEVICE_MEMORY"
            state = await hotbayd.describe()
            assert (state.images, state.engines) == ((code.image.digest,), ())
            assert state.pages_free == state.pages_total
            assert (await hotbayd.failed(stage(prose))).reason == "IMAGE_UNKNOWN"
            # A load of what is being staged does not wait for it.
            staging = asyncio.create_task(staged(hotbayd, stage(code, "third")))
            await hotbayd.stage("third", Stage.COPYING)
            assert (await hotbayd.exchange(load(code.key, code.image))).error == ""
            assert (await staging).error_reason == "INSUFFICIENT_DEVICE_MEMORY"
            assert (await hotbayd.failed(stage(code))).reason == "INVALID_STATE"
            answer = await gateway.run(code.key, PROMPT, greedy(8))
            assert answer.tokens == code.expected(PROMPT, 8)

    asyncio.run(run())


def test_a_swap_to_a_staged_model_that_fails_leaves_the_old_one_serving(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        arguments = ("--failpoints", "committing+1=raise")
        async with small(runtime_dir, 6, prose, code, arguments=arguments) as (_, hotbayd, gateway):
            assert (await hotbayd.exchange(load(prose.key, prose.image))).error == ""
            assert (await staged(hotbayd, stage(code))).error == ""
            stream = gateway.submit(prose.key, PROMPT, greedy(60))
            await gateway.begun(stream)
            result = await hotbayd.exchange(swap("swap", prose, code, in_flight=InFlight.RECOMPUTE))
            assert result.rolled_back
            assert (await gateway.ended(stream)).tokens == prose.expected(PROMPT, 60)
            state = await hotbayd.describe()
            (serving_,) = [one for one in state.engines if one.status is EngineStatus.ACTIVE]
            assert (serving_.model, serving_.spare, serving_.kv_bytes) == (
                prose.key,
                False,
                PAGE_BYTES,
            )
            assert state.pages_free == 4
            assert (await hotbayd.exchange(swap("swap2", prose, code))).error == ""
            answer = await gateway.run(code.key, PROMPT, greedy(8))
            assert answer.tokens == code.expected(PROMPT, 8)

    asyncio.run(run())
