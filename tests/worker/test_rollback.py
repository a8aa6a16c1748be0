"""Exchanges that fail by themselves: slow links, wrong weights, engines that break."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.link import control
from engine.link.control import EngineStatus, InFlight, Stage
from engine.link.tokens import Finish, Submit
from engine.worker.failpoints import FailPoint
from engine.worker.residency import Residency
from swap.image import complete
from swap.segment import Segment
from swap.writing import write_manifest
from tests.support.worker_stage import BuiltImage, greedy, load, worker_process
from tests.worker.conftest import Model, serving
from tests.worker.inside import PROMPT, WAIT_S, Inside
from tests.worker.preserving import Bench


def with_wrong_checksums(image: BuiltImage) -> BuiltImage:
    """The same weights under a manifest whose checksums they do not match."""
    segment = Segment.create(image.segment.size_bytes, "wrong")
    with image.segment.map() as source:
        os.pwrite(segment.descriptor, source.view(0, image.manifest.weights_bytes), 0)
    manifest = complete(image.manifest, {one.name: "1" * 32 for one in image.manifest.tensors})
    write_manifest(segment.descriptor, manifest)
    segment.seal()
    return BuiltImage(segment, manifest)


def test_weights_that_are_not_what_was_built_never_answer(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        wrong = with_wrong_checksums(code.image)
        async with (
            worker_process(runtime_dir) as worker,
            serving(worker, prose, code) as (hotbayd, gateway),
        ):
            await hotbayd.attach(wrong)
            stream = gateway.submit(prose.key, PROMPT, greedy(100))
            await gateway.begun(stream)
            exchange = load(
                code.key, wrong, "swap", outgoing=(prose.key,), in_flight=InFlight.RECOMPUTE
            )
            swapping = asyncio.create_task(hotbayd.exchange(exchange))
            await hotbayd.stage("swap", Stage.DRAINING)
            early = gateway.submit(code.key, PROMPT, greedy(4))
            result = await swapping
            assert (result.error_reason, result.rolled_back) == ("CORRUPT_WEIGHTS", True)
            answer = await gateway.ended(early)
            assert (answer.finish, answer.tokens) == (Finish.REQUEUE, [])
            assert (await gateway.ended(stream)).tokens == prose.expected(PROMPT, 100)
            assert [one.model for one in (await hotbayd.describe()).engines] == [prose.key]

    asyncio.run(run())


def test_a_copy_over_a_slow_link_is_stepped_behind_and_can_be_abandoned(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        size = code.image.manifest.weights_bytes
        arguments = ("--link-bytes-per-s", str(size / 0.6), "--stage-timeout-s", "20")
        async with (
            worker_process(runtime_dir, *arguments) as worker,
            serving(worker, prose, code) as (hotbayd, gateway),
        ):
            stream = gateway.submit(prose.key, PROMPT, greedy(150))
            await gateway.begun(stream)
            exchange = load(
                code.key, code.image, "swap", outgoing=(prose.key,), in_flight=InFlight.RECOMPUTE
            )
            swapping = asyncio.create_task(hotbayd.exchange(exchange))
            await hotbayd.stage("swap", Stage.COPYING)
            # Its step waits at the gate for layers that are on their way.
            early = gateway.submit(code.key, PROMPT, greedy(4))
            assert (await hotbayd.describe()).exchanging == "swap", "answered while the step waits"
            await hotbayd.done(control.Abandon("swap"))
            result = await swapping
            assert (result.error_reason, result.rolled_back) == ("CANCELLED", True)
            assert (await gateway.ended(early)).finish is Finish.REQUEUE
            assert (await gateway.ended(stream)).tokens == prose.expected(PROMPT, 150)
            # And once more, to its end: the first token is there before the commit.
            again = msgspec.structs.replace(exchange, operation="again")
            swapping = asyncio.create_task(hotbayd.exchange(again))
            await hotbayd.stage("again", Stage.COPYING)
            answer = await gateway.ended(gateway.submit(code.key, PROMPT, greedy(4)))
            assert answer.tokens == code.expected(PROMPT, 4)
            ledger = (await swapping).ledger
            assert ledger.copy_ms >= 550
            assert ledger.first_token_ms is not None

    asyncio.run(run())


class Eager(random.Random):
    """Of an exchange between whose turns as many steps are taken as may be."""

    def randint(self, a: int, b: int) -> int:
        return b


def test_what_is_brought_back_wrong_at_first_goes_on_from_right_weights_alone(
    bench: Callable[..., Bench], poem: Model, tale: Model, caplog: pytest.LogCaptureFixture
) -> None:
    one = bench(24, 64 << 20, draw=Eager())
    assert one.swap(None, poem).error == ""
    sent = one.sent[one.submit(poem, PROMPT, 40)]
    one.step(6)
    weights, copy_in, spoilt = one.resident(poem).weights, one.device.copy_in, []

    def spoil_once(destination: int, source: int, size_bytes: int) -> int:
        copy = copy_in(destination, source, size_bytes)
        if destination == weights.address and not spoilt:
            ctypes.memset(destination, 0, size_bytes)
            spoilt.append(size_bytes)
        return copy

    one.device.copy_in = spoil_once
    assert one.swap(poem, tale, fail_at=FailPoint.COPIED, turns=3).rolled_back
    assert spoilt
    assert "failed (attempt 1)" in caplog.text
    assert one.active() == [poem.key]
    one.run(lambda: not sent.open)
    assert sent.right
    computed = one.resident(poem).state().computed_tokens_total
    assert computed == len(PROMPT) + 40 - 1, "nothing is computed twice"
    one.finish()


class Broken(Exception):
    """What an engine's bug raises."""


def break_at_step(engine: Any, steps: int) -> None:
    """Have the engine raise in a later step."""
    step, left = engine.step, iter(range(steps))

    def failing() -> Any:
        if next(left, None) is None:
            raise Broken("a bug")
        return step()

    engine.step = failing


def test_an_engine_that_breaks_ends_its_own_requests_and_no_other(
    inside: Inside, prose: Model, code: Model
) -> None:
    assert inside.exchange(load(prose.key, prose.image, "1")).error == ""
    assert inside.exchange(load(code.key, code.image, "2")).error == ""
    break_at_step(inside.residency.residents[prose.key].engine, 5)
    inside.submit(1, prose.key, 40)
    # One that has not come to its turn.
    inside.desk.enter(9, prose.key)
    inside.outputs[9], inside.ended[9] = [], Future()
    inside.submit(2, code.key, 40)
    failed = inside.end_of(1)
    assert failed.finish is Finish.ERROR
    assert "Broken: a bug" in failed.error
    unstarted = inside.end_of(9)
    assert unstarted.finish is Finish.ABORT, "nothing was sent of it: it can be tried again"
    assert "Broken: a bug" in unstarted.error
    assert inside.end_of(2).finish is Finish.LENGTH
    assert inside.tokens(2) == code.expected(PROMPT, 40)
    inside.loop.call(lambda: None).result(WAIT_S)
    assert inside.statuses() == {prose.key: EngineStatus.FAILED, code.key: EngineStatus.ACTIVE}
    (state,) = [one for one in inside.loop.snapshot.engines if one.model == prose.key]
    assert (state.weights_bytes, state.kv_bytes, state.running) == (0, 0, 0)
    assert "a bug" in state.reason
    # What comes for it is handed back, and a load makes it anew.
    inside.submit(3, prose.key, 4)
    assert inside.end_of(3).finish is Finish.REQUEUE
    assert inside.exchange(load(prose.key, prose.image, "3")).error == ""
    inside.submit(4, prose.key, 6)
    assert inside.end_of(4).finish is Finish.LENGTH
    assert inside.tokens(4) == prose.expected(PROMPT, 6)


def test_an_incoming_engine_that_breaks_is_rolled_back_and_leaves_nothing(
    inside: Inside, prose: Model, code: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inside.exchange(load(prose.key, prose.image, "1")).error == ""
    free = inside.loop.snapshot.pages_free
    arrived = threading.Event()
    expect = Residency.expect

    def expect_broken(self: Residency, spec: control.EngineSpec) -> Any:
        resident = expect(self, spec)
        break_at_step(resident.engine, 0)
        number = 7
        inside.outputs[number], inside.ended[number] = [], Future()
        assert inside.desk.enter(number, spec.model)
        self.submit(Submit(number, spec.model, tuple(PROMPT), greedy(4)))
        arrived.set()
        return resident

    monkeypatch.setattr(Residency, "expect", expect_broken)
    result = inside.exchange(load(code.key, code.image, "2", outgoing=(prose.key,)))
    assert arrived.is_set()
    assert (result.error_reason, result.rolled_back) == ("INTERNAL", True)
    assert "Broken: a bug" in result.error
    assert inside.end_of(7).finish is Finish.REQUEUE
    assert inside.statuses() == {prose.key: EngineStatus.ACTIVE}
    assert inside.loop.snapshot.pages_free == free
    inside.submit(8, prose.key, 6)
    assert inside.end_of(8).finish is Finish.LENGTH
    assert inside.tokens(8) == prose.expected(PROMPT, 6)


def test_a_model_that_cannot_be_brought_back_has_failed_and_says_why(
    inside: Inside, prose: Model, code: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swap.errors import DeviceError
    from swap.host_device import HostDevice as Device

    assert inside.exchange(load(prose.key, prose.image, "1")).error == ""
    inside.submit(1, prose.key, 200)

    def refuse(self: Device, destination: int, source: int, size_bytes: int) -> None:
        raise DeviceError("the link is down")

    with monkeypatch.context() as context:
        context.setattr(Device, "copy_in", refuse)
        result = inside.exchange(
            load(
                code.key,
                code.image,
                "2",
                outgoing=(prose.key,),
                in_flight=InFlight.RECOMPUTE,
            )
        )
    assert (result.error_reason, result.rolled_back) == ("TRANSFER_FAILED", True)
    end = inside.end_of(1)
    assert end.finish in (Finish.ERROR, Finish.REQUEUE)
    assert (end.finish is Finish.REQUEUE) == (inside.tokens(1) == [])
    assert inside.statuses() == {prose.key: EngineStatus.FAILED}
    (state,) = inside.loop.snapshot.engines
    assert "the link is down" in state.reason
    assert inside.loop.snapshot.pages_free == inside.residency.pool.total_pages
    assert inside.exchange(load(prose.key, prose.image, "3")).error == ""
    inside.submit(2, prose.key, 6)
    assert inside.end_of(2).finish is Finish.LENGTH
    assert inside.tokens(2) == prose.expected(PROMPT, 6)


def test_a_request_that_the_engine_chokes_on_ends_alone(
    inside: Inside, prose: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inside.exchange(load(prose.key, prose.image, "1")).error == ""
    engine = inside.residency.residents[prose.key].engine
    with monkeypatch.context() as context:
        context.setattr(engine, "submit", lambda *arguments: 1 // 0)
        inside.submit(1, prose.key, 4)
    assert inside.end_of(1).finish is Finish.ERROR
    inside.submit(2, prose.key, 6)
    assert inside.end_of(2).finish is Finish.LENGTH
    assert inside.tokens(2) == prose.expected(PROMPT, 6)


def test_a_bug_in_the_loop_itself_is_told_and_ends_it(prose: Model) -> None:
    stage = Inside([prose])
    crash = Broken("in the loop")

    def mail() -> None:
        raise crash

    stage.loop.mailbox.post(mail)
    assert stage.loop.join(WAIT_S)
    assert stage.crashes == [crash]
    for image in stage.residency.images.values():
        image.close()
    stage.device.close()


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_engines_that_are_active_at_once_share_the_step_thread_by_weight(
    inside: Inside, prose: Model, code: Model, weight: float
) -> None:
    assert inside.exchange(load(prose.key, prose.image, "1")).error == ""
    assert inside.exchange(load(code.key, code.image, "2", weight=weight)).error == ""
    # Time passes by the steps alone: those of one engine take four times as long.
    lengths, now, order = {prose.key: 0.004, code.key: 0.001}, [0.0], []

    def pass_time() -> None:
        inside.loop._clock = lambda: now[0]
        for key, resident in inside.residency.residents.items():

            def step(key: str = key, real: Any = resident.engine.step) -> Any:
                order.append(key)
                now[0] += lengths[key]
                return real()

            resident.engine.step = step

    def begin() -> None:
        pass_time()
        for number, (key, count) in enumerate(((prose.key, 30), (code.key, 150)), 1):
            inside.outputs[number], inside.ended[number] = [], Future()
            assert inside.desk.enter(number, key)
            inside.residency.submit(Submit(number, key, tuple(PROMPT), greedy(count)))

    inside.loop.call(begin).result(WAIT_S)
    assert inside.end_of(1).finish is inside.end_of(2).finish is Finish.LENGTH
    assert inside.tokens(1) == prose.expected(PROMPT, 30)
    assert inside.tokens(2) == code.expected(PROMPT, 150)
    both = order[: 1 + min(len(order) - 1 - order[::-1].index(key) for key in lengths)]
    steps = {key: both.count(key) for key in lengths}
    assert steps[code.key] == pytest.approx(4 * weight * steps[prose.key], rel=0.1, abs=4)
