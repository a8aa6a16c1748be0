"""The token link of a real worker: cancelling, credit, breaking, replacing, nonsense."""

from __future__ import annotations

import asyncio
import os
import struct

import pytest

from engine.link import control
from engine.link.errors import LinkClosed
from engine.link.tokens import STEP_FRAMES_CREDIT, Cancel, Finish, Grant, Sampling, Submit
from tests.support.worker_stage import HotbaydSide, WorkerStage, connect, greedy, load
from tests.worker.conftest import Model, serving

PROMPT = [8, 6, 7, 5, 3]


async def idle(hotbayd: HotbaydSide) -> control.WorkerState:
    """Wait until nothing runs or waits, and no KV is used."""
    return await hotbayd.state_where(
        lambda state: all(
            one.running + one.waiting + one.kv_used_bytes == 0 for one in state.engines
        )
    )


def drop_states(hotbayd: HotbaydSide) -> None:
    while not hotbayd.states.empty():
        hotbayd.states.get_nowait()


def test_cancelled_and_refused_requests_hold_nothing(
    shared_worker: WorkerStage, prose: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose) as (hotbayd, gateway):
            streams = [gateway.submit(prose.key, [*PROMPT, n], greedy(240)) for n in range(6)]
            for stream in streams:
                await gateway.begun(stream)
            drop_states(hotbayd)
            for stream in streams:
                gateway.cancel(stream)
            gateway.cancel(999)
            await idle(hotbayd)
            # Of what was not cancelled the end would have come.
            assert all(gateway.answers[stream].finish is None for stream in streams)
            for prompt, sampling in (
                ([], greedy(4)),
                ([1] * 300, greedy(4)),
                ([10**6], greedy(4)),
                ([1], greedy(0)),
            ):
                answer = await gateway.ended(gateway.submit(prose.key, prompt, sampling))
                assert (answer.finish, answer.tokens) == (Finish.ERROR, [])
                assert answer.error
            unknown = await gateway.ended(gateway.submit("nobody@1", PROMPT, greedy(4)))
            assert unknown.finish is Finish.REQUEUE

    asyncio.run(run())


def test_a_full_queue_hands_requests_back(
    shared_worker: WorkerStage, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            narrow = load(
                code.key, code.image, "narrow", running_requests_max=1, waiting_requests_max=2
            )
            assert (await hotbayd.exchange(narrow)).error == ""
            first = gateway.submit(code.key, PROMPT, greedy(200))
            await gateway.begun(first)
            queued = [gateway.submit(code.key, PROMPT, greedy(2)) for _ in range(2)]
            surplus = [gateway.submit(code.key, PROMPT, greedy(2)) for _ in range(3)]
            for number in surplus:
                answer = await gateway.ended(number)
                assert (answer.finish, answer.tokens) == (Finish.REQUEUE, [])
            for number in queued:
                assert (await gateway.ended(number)).tokens == code.expected(PROMPT, 2)

    asyncio.run(run())


def test_sampling_is_the_same_alone_and_in_company(
    shared_worker: WorkerStage, prose: Model
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose) as (_, gateway):
            drawn = Sampling(max_tokens=20, temperature=0.8, top_k=20, seed=7, logprobs=2)
            alone = await gateway.run(prose.key, PROMPT, drawn)
            company = [gateway.submit(prose.key, [n, 2, 3], greedy(40)) for n in range(9)]
            among = await gateway.run(prose.key, PROMPT, drawn)
            assert alone.tokens == among.tokens
            assert len(alone.tokens) == 20
            for output in alone.outputs:
                (logprob,) = output.logprobs
                assert logprob.logprob <= logprob.top[0][1] + 1e-6
                assert len(logprob.top) == 2
            for number in company:
                await gateway.ended(number)

    asyncio.run(run())


def test_without_credit_the_worker_stands_still(shared_worker: WorkerStage, prose: Model) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose) as (hotbayd, _):
            gateway = await shared_worker.gateway(grants=False)
            await gateway.run(prose.key, PROMPT, greedy(200))
            stream = gateway.submit(prose.key, PROMPT, greedy(200))
            while gateway.frames < STEP_FRAMES_CREDIT:
                gateway.arrived.clear()
                await gateway.arrived.wait()
            # Whatever is asked for now gets no frame, but is done as soon as there is credit.
            unknown = gateway.submit("nobody@1", PROMPT, greedy(4))
            standing = await hotbayd.state_where(
                # What was told before the model came in may still stand in line here.
                lambda state: any(
                    one.generation_tokens_total >= STEP_FRAMES_CREDIT for one in state.engines
                )
            )
            before = standing.engines[0].generation_tokens_total
            await hotbayd.state_where(lambda state: True)
            await hotbayd.state_where(lambda state: True)
            assert gateway.frames == STEP_FRAMES_CREDIT
            assert (await hotbayd.describe()).engines[0].generation_tokens_total == before
            gateway.link.post(Grant(STEP_FRAMES_CREDIT))
            assert (await gateway.ended(unknown)).finish is Finish.REQUEUE
            assert (await gateway.ended(stream)).tokens == prose.expected(PROMPT, 200)

    asyncio.run(run())


@pytest.mark.parametrize("manner", ["closed", "replaced"])
def test_when_the_gateway_goes_all_of_its_requests_do(
    shared_worker: WorkerStage, prose: Model, code: Model, manner: str
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose, code) as (hotbayd, gateway):
            for number in range(5):
                await gateway.begun(gateway.submit(prose.key, [*PROMPT, number], greedy(240)))
            drop_states(hotbayd)
            if manner == "closed":
                await gateway.close()
            successor = await shared_worker.gateway()
            # The same numbers again: they are of this link now.
            answer = await successor.run(prose.key, PROMPT, greedy(30))
            assert answer.tokens == prose.expected(PROMPT, 30)
            await idle(hotbayd)
            if manner == "replaced":
                with pytest.raises(LinkClosed):
                    await gateway.task

    asyncio.run(run())


def bad_frames() -> dict[str, bytes]:
    good = struct.pack("<IB", 3, 0)
    return {
        "too long": struct.pack("<IB", 1 << 31, 0),
        "no message": good + b"\xc1\xc1\xc1",
        "random": os.urandom(4096),
        "empty payload": struct.pack("<IB", 0, 0),
    }


@pytest.mark.parametrize("side", ["control", "tokens"])
def test_nonsense_ends_its_link_and_nothing_else(
    shared_worker: WorkerStage, prose: Model, side: str
) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose) as (hotbayd, gateway):
            loop = asyncio.get_running_loop()
            for name, data in bad_frames().items():
                sock = await connect(shared_worker.directory / f"{side}.sock")
                await loop.sock_sendall(sock, data)
                async with asyncio.timeout(120):
                    try:
                        while await loop.sock_recv(sock, 4096):
                            pass
                    except ConnectionResetError:
                        pass
                sock.close()
                assert shared_worker.process.poll() is None, name
            hotbayd, gateway = await shared_worker.hotbayd(), await shared_worker.gateway()
            answer = await gateway.run(prose.key, PROMPT, greedy(5))
            assert answer.tokens == prose.expected(PROMPT, 5)
            assert (await hotbayd.describe()).engines[0].running == 0

    asyncio.run(run())


def test_a_number_used_twice_ends_the_link(shared_worker: WorkerStage, prose: Model) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose) as (_, gateway):
            number = gateway.submit(prose.key, PROMPT, greedy(240))
            await gateway.begun(number)
            gateway.link.post(Submit(number, prose.key, tuple(PROMPT), greedy(4)))
            gateway.link.post(Cancel(number + 1))
            with pytest.raises(LinkClosed):
                await asyncio.wait_for(gateway.task, 10)
            gateway = await shared_worker.gateway()
            answer = await gateway.run(prose.key, PROMPT, greedy(5))
            assert answer.tokens == prose.expected(PROMPT, 5)

    asyncio.run(run())
