"""Exchanges from hotbayd's side: what is refused, what becomes of requests, who stays."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from engine.link import control
from engine.link.control import EngineStatus, Exchange, InFlight, Stage
from engine.link.tokens import Finish
from tests.support.worker_stage import BuiltImage, WorkerStage, greedy, load, worker_process
from tests.worker.conftest import Model, serving

PROMPT = [5, 9, 101, 44, 7]
PAGE_BYTES = 2 << 20


def test_what_cannot_be_done_is_refused_before_anything_changes(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    def swap(**changes: object) -> Exchange:
        request = load(code.key, code.image, "op", outgoing=(prose.key,))
        return msgspec.structs.replace(request, **changes)

    unknown = BuiltImage(
        code.image.segment, msgspec.structs.replace(code.image.manifest, digest="f" * 64)
    )

    async def run() -> None:
        async with (
            worker_process(runtime_dir, memory_bytes=3 * PAGE_BYTES) as worker,
            serving(worker, prose, code) as (hotbayd, gateway),
        ):
            before = await hotbayd.describe()
            cases = [
                (load(code.key, unknown, "op", outgoing=(prose.key,)), "IMAGE_UNKNOWN"),
                (swap(outgoing=("other@1",)), "MODEL_NOT_FOUND"),
                (load(prose.key, prose.image, "op"), "INVALID_STATE"),
                (load(prose.key, prose.image, "op", outgoing=(prose.key,)), "INVALID_STATE"),
                (
                    load(code.key, code.image, "op", running_requests_max=0, outgoing=(prose.key,)),
                    "INVALID_ARGUMENT",
                ),
                (
                    load(code.key, code.image, "op", context_tokens=1 << 20, outgoing=(prose.key,)),
                    "INSUFFICIENT_DEVICE_MEMORY",
                ),
                (load(code.key, code.image, "op"), "INSUFFICIENT_DEVICE_MEMORY"),
            ]
            for request, reason in cases:
                refusal = await hotbayd.failed(request)
                assert refusal.reason == reason, refusal
            # One page is free; weights and KV of the second model take one page each.
            assert refusal.metadata["needed_bytes"] == str(2 * PAGE_BYTES)
            assert refusal.metadata["available_bytes"] == str(PAGE_BYTES)
            assert str(2 * PAGE_BYTES) in refusal.message
            after = await hotbayd.describe()
            assert (after.pages_free, after.exchanged) == (before.pages_free, before.exchanged)
            assert [one.model for one in after.engines] == [prose.key]
            answer = await gateway.run(prose.key, PROMPT, greedy(100))
            assert answer.tokens == prose.expected(PROMPT, 100)

    asyncio.run(run())


def test_draining_finishes_what_runs_and_hands_back_what_comes(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            await gateway.stand_still(prose.key)
            streams = [gateway.submit(prose.key, [*PROMPT, n], greedy(60)) for n in range(8)]
            for stream in streams:
                await gateway.begun(stream)
            swapping = asyncio.create_task(
                hotbayd.exchange(load(code.key, code.image, "swap", outgoing=(prose.key,)))
            )
            await hotbayd.stage("swap", Stage.DRAINING)
            late = gateway.submit(prose.key, PROMPT, greedy(4))
            early = gateway.submit(code.key, PROMPT, greedy(4))
            gateway.flow()
            assert (await gateway.ended(late)).finish is Finish.REQUEUE
            for number, stream in enumerate(streams):
                answer = await gateway.ended(stream)
                assert answer.tokens == prose.expected([*PROMPT, number], 60)
            result = await swapping
            ledger = result.ledger
            assert (result.error, ledger.requests_finished, ledger.requests_kept) == ("", 8, 0)
            assert (await gateway.ended(early)).tokens == code.expected(PROMPT, 4)
            phases = ledger.drain_ms + ledger.evict_ms + ledger.copy_ms + ledger.verify_ms
            assert 0 < phases <= ledger.total_ms
            assert ledger.link_bytes_per_s > 0
            # The request for the new model waited through the swap, so its token was timed.
            last = (await hotbayd.describe()).exchanged
            assert last is not None
            assert last.ledger.first_token_ms is not None
            assert last.ledger.first_token_ms >= ledger.drain_ms

    asyncio.run(run())


def test_recomputed_requests_go_on_with_the_same_tokens_when_the_model_is_back(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            await gateway.stand_still(prose.key)
            streams = [gateway.submit(prose.key, [*PROMPT, n], greedy(150)) for n in range(4)]
            for stream in streams:
                await gateway.begun(stream)
            away = load(
                code.key, code.image, "1", outgoing=(prose.key,), in_flight=InFlight.RECOMPUTE
            )
            result = await hotbayd.exchange(away)
            gateway.flow()
            assert (result.error, result.ledger.requests_kept) == ("", 4)
            state = await hotbayd.describe()
            parked = next(one for one in state.engines if one.model == prose.key)
            assert (parked.status, parked.waiting, parked.kv_bytes) == (
                EngineStatus.STANDBY,
                4,
                0,
            )
            assert (await gateway.run(code.key, PROMPT, greedy(5))).tokens == code.expected(
                PROMPT, 5
            )
            # One of those that wait is cancelled meanwhile.
            gateway.cancel(streams[3])
            back = load(prose.key, prose.image, "2", outgoing=(code.key,))
            assert (await hotbayd.exchange(back)).error == ""
            for number, stream in enumerate(streams[:3]):
                answer = await gateway.ended(stream)
                assert answer.tokens == prose.expected([*PROMPT, number], 150)
            assert gateway.answers[streams[3]].finish is None
            await hotbayd.state_where(
                lambda state: all(one.running + one.waiting == 0 for one in state.engines)
            )

    asyncio.run(run())


@pytest.mark.parametrize("memory_pages", [24, 3])
def test_preserved_requests_go_on_with_nothing_computed_again(
    runtime_dir: Path, prose: Model, code: Model, memory_pages: int
) -> None:
    async def run() -> None:
        async with (
            worker_process(runtime_dir, memory_bytes=memory_pages << 21) as worker,
            serving(worker, prose, code) as (hotbayd, gateway),
        ):
            streams = [gateway.submit(prose.key, [*PROMPT, n], greedy(200)) for n in range(4)]
            for stream in streams:
                await gateway.begun(stream)
            for number in range(3):
                swap = load(
                    code.key,
                    code.image,
                    f"{number}-away",
                    outgoing=(prose.key,),
                    in_flight=(InFlight.PRESERVE, InFlight.DRAIN)[number % 2],
                    drain_timeout_s=0.0,
                )
                ledger = (await hotbayd.exchange(swap)).ledger
                assert ledger.requests_preserved == ledger.requests_kept
                state = await hotbayd.describe()
                paused = next(one for one in state.engines if one.model == prose.key)
                assert paused.waiting == paused.paused + paused.parked == ledger.requests_kept
                answer = await gateway.run(code.key, PROMPT, greedy(5))
                assert answer.tokens == code.expected(PROMPT, 5)
                back = load(prose.key, prose.image, f"{number}-back", outgoing=(code.key,))
                assert (await hotbayd.exchange(back)).error == ""
            for number, stream in enumerate(streams):
                answer = await gateway.ended(stream)
                assert answer.tokens == prose.expected([*PROMPT, number], 200)
            # The last step's figures are told after its tokens.
            state = await hotbayd.state_where(
                lambda state: any(one.generation_tokens_total == 800 for one in state.engines)
            )
            served = next(one for one in state.engines if one.model == prose.key)
            # Each token goes through the model once, the last one drawn not at all; what prompts
            # have in common does so once for all of them.
            computed = served.computed_tokens_total + served.prefix_hit_tokens_total
            assert computed == 4 * (len(PROMPT) + 1 + 200 - 1)
            assert served.parked_bytes == 0

    asyncio.run(run())


@pytest.mark.parametrize("policy", [InFlight.ABORT, InFlight.DRAIN])
def test_a_drain_that_takes_too_long_and_an_abort(
    shared_worker: WorkerStage, prose: Model, code: Model, policy: InFlight
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            await gateway.stand_still(prose.key)
            stream = gateway.submit(prose.key, PROMPT, greedy(240))
            await gateway.begun(stream)
            swap = load(
                code.key,
                code.image,
                "swap",
                outgoing=(prose.key,),
                in_flight=policy,
                drain_timeout_s=0.01,
            )
            ledger = (await hotbayd.exchange(swap)).ledger
            gateway.flow()
            if policy is InFlight.ABORT:
                assert (ledger.requests_lost, ledger.requests_kept) == (1, 0)
                answer = await gateway.ended(stream)
                assert answer.finish is Finish.ABORT
                assert answer.tokens == prose.expected(PROMPT, 240)[: len(answer.tokens)]
            else:
                assert (ledger.requests_lost, ledger.requests_kept) == (0, 1)
                unload = Exchange(operation="unload", outgoing=(prose.key,), discard=True)
                assert (await hotbayd.exchange(unload)).ledger.requests_lost == 1
                answer = await gateway.ended(stream)
                assert answer.finish is Finish.ERROR
                assert "unloaded" in answer.error

    asyncio.run(run())


def test_a_drained_model_keeps_its_weights_and_serves_again_when_resumed(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            await gateway.stand_still(prose.key)
            stream = gateway.submit(prose.key, PROMPT, greedy(100))
            await gateway.begun(stream)
            await hotbayd.done(control.Drain(prose.key, InFlight.RECOMPUTE))
            gateway.flow()
            (engine,) = (await hotbayd.describe()).engines
            assert (engine.status, engine.waiting) == (EngineStatus.STAGED, 1)
            assert engine.weights_bytes > 0
            refused = await gateway.ended(gateway.submit(prose.key, PROMPT, greedy(4)))
            assert refused.finish is Finish.REQUEUE
            # Coming back from STAGED by an exchange takes no copy.
            result = await hotbayd.exchange(load(prose.key, prose.image, "again"))
            assert (result.error, result.ledger.copied_bytes) == ("", 0)
            assert (await gateway.ended(stream)).tokens == prose.expected(PROMPT, 100)
            await hotbayd.done(control.Drain(prose.key))
            await hotbayd.done(control.Resume(prose.key))
            answer = await gateway.run(prose.key, PROMPT, greedy(6))
            assert answer.tokens == prose.expected(PROMPT, 6)
            for message in (control.Drain("other@1"), control.Resume("other@1")):
                assert (await hotbayd.failed(message)).reason == "MODEL_NOT_FOUND"
            # A drained model may go, and a failure leaves it drained.
            await hotbayd.done(control.Drain(prose.key))
            swap = load(code.key, code.image, "swap", outgoing=(prose.key,))
            assert (await hotbayd.exchange(swap)).error == ""
            assert (await hotbayd.failed(control.Resume(prose.key))).reason == "INVALID_STATE"

    asyncio.run(run())


def test_several_models_are_active_side_by_side(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            assert (await hotbayd.exchange(load(code.key, code.image, "beside"))).error == ""
            models = [prose, code] * 6
            answers = await asyncio.gather(
                *(
                    gateway.run(model.key, [*PROMPT, number], greedy(40))
                    for number, model in enumerate(models)
                )
            )
            for number, (model, answer) in enumerate(zip(models, answers, strict=True)):
                assert answer.tokens == model.expected([*PROMPT, number], 40)
            state = await hotbayd.describe()
            assert {one.status for one in state.engines} == {EngineStatus.ACTIVE}
            assert all(one.generation_tokens_total == 6 * 40 for one in state.engines)
            assert all(one.prompt_tokens_total == 6 * 6 for one in state.engines)
            # Both go at once for a third exchange that has nothing to bring.
            both = Exchange(operation="off", outgoing=(prose.key, code.key))
            assert (await hotbayd.exchange(both)).ledger.evicted_bytes > 0
            state = await hotbayd.describe()
            assert state.pages_free == state.pages_total

    asyncio.run(run())


def test_an_exchange_ends_without_hotbayd_and_is_answered_again_when_asked_again(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (first, _):
            # Its stream stands still, and so does the drain.
            gateway = await shared_worker.gateway()
            await gateway.stand_still(prose.key)
            stream = gateway.submit(prose.key, PROMPT, greedy(200))
            await gateway.begun(stream)
            request = load(code.key, code.image, "swap", outgoing=(prose.key,))
            lost = asyncio.create_task(first.call(request))
            await first.stage("swap", Stage.DRAINING)
            second = await shared_worker.hotbayd()
            await first.closed.wait()  # the newer connection replaced the older one
            await asyncio.gather(lost, return_exceptions=True)
            assert (await second.describe()).exchanging == "swap"
            other = await second.failed(msgspec.structs.replace(request, operation="other"))
            assert other.reason == "OPERATION_IN_PROGRESS"
            joining = asyncio.create_task(second.exchange(request))
            gateway.flow()
            joined = await joining
            assert (await gateway.ended(stream)).tokens == prose.expected(PROMPT, 200)
            state = await second.describe()
            assert (state.exchanging, state.exchanged) == ("", joined)
            assert await second.exchange(request) == joined, "once done, the same answer"
            assert (await second.failed(control.Abandon("swap"))).reason == "INVALID_STATE"

    asyncio.run(run())


def test_images_are_forgotten_only_when_no_engine_on_the_device_needs_them(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, _):
            await hotbayd.attach(prose.image)  # again: no second mapping
            assert set((await hotbayd.describe()).images) == {prose.image.digest, code.image.digest}
            refusal = await hotbayd.failed(control.DetachImage(prose.image.digest))
            assert refusal.reason == "IMAGE_IN_USE"
            swap = load(code.key, code.image, "swap", outgoing=(prose.key,))
            assert (await hotbayd.exchange(swap)).error == ""
            await hotbayd.done(control.DetachImage(prose.image.digest))
            await hotbayd.done(control.DetachImage(prose.image.digest))
            state = await hotbayd.describe()
            assert state.images == (code.image.digest,)
            assert [one.model for one in state.engines] == [code.key]
            reply = await hotbayd.call(control.MeasureLink(copy_bytes=1 << 20))
            assert reply.link_bytes_per_s > 0
            assert reply.out_bytes_per_s > 0
            assert (await hotbayd.describe()).link_bytes_per_s == reply.link_bytes_per_s
            # What cannot be an image is refused and closed.
            refusal = await hotbayd.failed(
                control.AttachImage("0" * 64), (code.image.segment.descriptor,)
            )
            assert refusal.reason == "CORRUPT_WEIGHTS"
            assert (await hotbayd.failed(control.AttachImage("1" * 64))).reason == "INVALID_STATE"

    asyncio.run(run())
