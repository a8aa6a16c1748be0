"""Every fail point x what happens there x what becomes of requests: the old model serves on.

One scenario reaches every point of an exchange: memory is so short that KV of the model that leaves
has to be parked, KV of the one that comes back was, its image is packed, and it has a canary. What
is killed is a real process.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.link import control
from engine.link.control import Canary, InFlight, StageWeights
from engine.link.errors import LinkError
from engine.worker.failpoints import Action, FailPoint, FailPoints, Trigger
from engine.worker.process import EXIT_CRASHED
from tests.support.worker_stage import GatewaySide, HotbaydSide, greedy, load, worker_process
from tests.worker.conftest import Model
from tests.worker.preserving import PAGE, Bench

MIB = 1 << 20
PAGES = 7
CANARY = Canary((3, 1, 4, 1, 5))
PROMPTS = [[(5 * seed + 3 * place) % 211 for place in range(70)] for seed in range(5)]
COUNT = 40

KV_ONLY = {FailPoint.PARKING, FailPoint.UNPARKING}
"""What is raised there costs KV, which is computed again, and not the exchange."""
STEPPING = {FailPoint.GIVING_WAY}
"""What steps reach, whether there is an exchange or not; it costs KV too."""
ELSEWHERE = {FailPoint.STAGING, *STEPPING}
IN_EXCHANGE = [point for point in FailPoint if point not in ELSEWHERE]
PASSED = {
    FailPoint.PARKING: 0,
    FailPoint.UNPACKING: 1,
    FailPoint.UNPARKING: 0,
    FailPoint.CANARY: 0,
    FailPoint.ROLLING_BACK: 0,
}
"""How often a point is passed before the exchange that is to fail; 2 where it says nothing."""


NEVER_BEFORE = {FailPoint.STAGING, FailPoint.UNPACKING, *STEPPING}
"""What the load of a plain model does not pass."""


@pytest.fixture
def bench(verse: Model, tale: Model, prose: Model) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(pages: int = PAGES, parking_bytes: int = 64 * MIB) -> Bench:
        made.append(Bench([verse, tale, prose], pages, parking_bytes, strict=True))
        return made[-1]

    yield make
    for one in made:
        one.close()


def begin(one: Bench, verse: Model, tale: Model) -> None:
    """`verse` has KV parked, `tale` serves, and both have requests that are not finished."""
    assert one.swap(None, verse).error == ""
    for prompt in PROMPTS:
        one.submit(verse, prompt, COUNT)
    one.step(6)
    assert one.swap(verse, tale).ledger.parked_bytes > 0
    for prompt in PROMPTS:
        one.submit(tale, prompt, COUNT)
    one.step(32)


@pytest.mark.parametrize("policy", InFlight)
@pytest.mark.parametrize("action", [Action.RAISE, Action.HANG])
@pytest.mark.parametrize("point", IN_EXCHANGE)
def test_wherever_it_fails_or_hangs_nothing_is_lost(
    bench: Callable[..., Bench],
    verse: Model,
    tale: Model,
    point: FailPoint,
    action: Action,
    policy: InFlight,
) -> None:
    one = bench()
    begin(one, verse, tale)
    running = one.resident(tale).engine.running
    swap: dict[str, Any] = {"fail_at": point, "action": action, "canary": CANARY}
    if point is FailPoint.PLANNED:
        with pytest.raises(Exception, match="planned"):
            one.swap(tale, verse, policy, **swap)
        serving = tale
    else:
        result = one.swap(tale, verse, policy, **swap)
        parked = policy in (InFlight.DRAIN, InFlight.PRESERVE)
        reached = parked or point is not FailPoint.PARKING
        assert (point in one.points.reached) == reached
        committed = not reached or (point in KV_ONLY and action is Action.RAISE)
        assert (result.error == "") == committed, result.error
        if action is Action.HANG and reached and point is not FailPoint.ROLLING_BACK:
            assert result.error_reason == "TIMED_OUT"
        assert result.rolled_back != committed
        assert (result.canary is not None) == committed
        serving = verse if committed else tale
    assert one.active() == [serving.key]
    lost = sum(sent.cancelled for sent in one.sent.values())
    aborted = policy is InFlight.ABORT and point is not FailPoint.PLANNED
    assert lost == (running if aborted else 0), "those of which no token came are sent again"
    one.finish()


@pytest.mark.parametrize("action", [Action.RAISE, Action.HANG])
def test_a_staging_that_fails_or_hangs_leaves_all_as_it_was(
    bench: Callable[..., Bench], verse: Model, tale: Model, action: Action
) -> None:
    one = bench(24)
    one.swap(None, tale)
    one.submit(tale, PROMPTS[0], COUNT)
    one.step(3)
    free = one.pool.free_pages
    result = one.stage(verse, fail_at=FailPoint.STAGING, action=action)
    assert result.rolled_back
    assert result.error_reason == ("TIMED_OUT" if action is Action.HANG else "TRANSFER_FAILED")
    assert (one.staged(), one.active()) == ([], [tale.key])
    assert one.pool.free_pages >= free
    assert one.stage(verse).error == ""
    assert one.staged() == [verse.key]
    one.finish()


@pytest.mark.parametrize("action", [Action.RAISE, Action.HANG])
def test_parking_what_gives_way_fails_and_costs_computing_alone(
    bench: Callable[..., Bench], verse: Model, action: Action
) -> None:
    one = bench(PAGES)
    points = FailPoints({FailPoint.GIVING_WAY: Trigger(action)})
    passed: list[int] = []

    def reach() -> None:
        passed.append(one.area_bytes)
        points.reach(FailPoint.GIVING_WAY, lambda: None)

    one.giving_way = reach
    one.residency.linked(1e12)
    one.swap(None, verse)
    for prompt in PROMPTS:
        one.submit(verse, prompt, 3 * COUNT)
    one.run(lambda: not any(sent.open for sent in one.sent.values()))
    state = one.resident(verse).state()
    assert len(passed) > 1
    assert state.preemptions_parked_total == len(passed) - 1
    one.finish()


def test_there_is_no_point_that_nothing_reaches(
    bench: Callable[..., Bench], verse: Model, tale: Model
) -> None:
    one = bench()
    begin(one, verse, tale)
    assert one.swap(tale, verse, canary=CANARY, fail_at=FailPoint.ROLLING_BACK).rolled_back
    reached = set(one.points.reached)
    assert one.swap(tale, verse, canary=CANARY).error == ""
    reached |= set(one.points.reached)
    assert reached == set(IN_EXCHANGE)
    one.finish()
    one = bench(24)
    one.stage(verse)
    assert set(one.points.reached) == ELSEWHERE - STEPPING
    assert set(IN_EXCHANGE) | ELSEWHERE == set(FailPoint)


# In real processes.

DEADLINE_S = "5"
"""Of a stage: what hangs overruns it, and what does not must not, on a busy machine either."""


async def begin_in_process(
    hotbayd: HotbaydSide, gateway: GatewaySide, verse: Model, tale: Model, *, hangs: bool = False
) -> None:
    """As `begin`; with `hangs` parking does so first."""
    for model in (verse, tale):
        await hotbayd.attach(model.image)
    assert (await hotbayd.exchange(load(verse.key, verse.image))).error == ""
    await gateway.stand_still(verse.key)
    streams = [gateway.submit(verse.key, prompt, greedy(150)) for prompt in PROMPTS]
    for stream in streams:
        await gateway.begun(stream)
    away = load(tale.key, tale.image, "away", outgoing=(verse.key,), in_flight=InFlight.PRESERVE)
    if hangs:
        result = await hotbayd.exchange(away)
        assert (result.error_reason, result.rolled_back) == ("TIMED_OUT", True)
        away = msgspec.structs.replace(away, operation="away again")
    result = await hotbayd.exchange(away)
    assert result.error == ""
    assert result.ledger.parked_bytes > 0
    gateway.flow()
    streams = [gateway.submit(tale.key, prompt, greedy(150)) for prompt in PROMPTS]
    for stream in streams:
        await gateway.begun(stream)


def back(operation: str, verse: Model, tale: Model) -> control.Exchange:
    request = load(
        verse.key,
        verse.image,
        operation,
        outgoing=(tale.key,),
        in_flight=InFlight.PRESERVE,
    )
    return msgspec.structs.replace(request, canary=CANARY)


def after(point: FailPoint, action: Action) -> str:
    text = f"{point}+{PASSED.get(point, 2)}={action}"
    if point is FailPoint.ROLLING_BACK:
        text += f",{FailPoint.COPIED}+2=raise"
    return text


@pytest.mark.slow
def test_what_hangs_in_a_process_ends_at_its_deadline(
    runtime_dir: Path, verse: Model, tale: Model
) -> None:
    points = [FailPoint.UNPARKING, FailPoint.UNPACKING, FailPoint.CANARY]

    async def run() -> None:
        switched = ",".join(after(point, Action.HANG) for point in (FailPoint.PARKING, *points))
        arguments = ("--failpoints", switched, "--stage-timeout-s", DEADLINE_S, "--strict")
        memory = PAGES * PAGE
        async with worker_process(runtime_dir, *arguments, memory_bytes=memory) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            await begin_in_process(hotbayd, gateway, verse, tale, hangs=True)
            # What two threads hang at ends by one deadline.
            ended: list[str] = []
            while not ended or ended[-1]:
                result = await hotbayd.exchange(back(f"{len(ended)}", verse, tale))
                ended.append(result.error_reason)
            assert ended[:-1] == ["TIMED_OUT"] * (len(ended) - 1)
            assert 2 <= len(ended) - 1 <= len(points)
            answer = await gateway.run(verse.key, PROMPTS[0][:9], greedy(8))
            assert answer.tokens == verse.expected(PROMPTS[0][:9], 8)

    asyncio.run(run())


@pytest.mark.slow
def test_a_device_that_does_not_return_ends_the_worker(runtime_dir: Path, tale: Model) -> None:
    async def run() -> None:
        arguments = ("--failpoints", f"{FailPoint.COPYING}=stick", "--stage-timeout-s", DEADLINE_S)
        async with worker_process(runtime_dir, *arguments) as worker:
            hotbayd = await worker.hotbayd()
            await hotbayd.attach(tale.image)
            with pytest.raises(LinkError):
                await hotbayd.exchange(load(tale.key, tale.image))
            assert await worker.ended() == EXIT_CRASHED

    asyncio.run(run())


async def until_killed(
    hotbayd: HotbaydSide,
    gateway: GatewaySide,
    point: FailPoint,
    verse: Model,
    tale: Model,
    prose: Model,
) -> None:
    if point in KV_ONLY:
        await begin_in_process(hotbayd, gateway, verse, tale)
        await hotbayd.call(back("back", verse, tale))
    spec = load(verse.key, verse.image).incoming
    assert spec is not None
    if point in STEPPING:
        assert (await hotbayd.exchange(back("swap", verse, prose))).error == ""
        streams = [gateway.submit(verse.key, prompt, greedy(150)) for prompt in PROMPTS]
        for stream in streams:
            await gateway.ended(stream)
    if point is FailPoint.STAGING:
        await hotbayd.call(StageWeights("stage", spec))
    await hotbayd.call(back("swap", verse, prose))


@pytest.mark.slow
def test_a_worker_killed_anywhere_is_followed_by_one_that_serves(
    runtime_dir: Path, verse: Model, tale: Model, prose: Model
) -> None:
    async def run() -> None:
        for point in FailPoint:
            passed = PASSED.get(point, 1) if point not in NEVER_BEFORE else 0
            points = f"{point}+{passed}=kill"
            if point is FailPoint.ROLLING_BACK:
                points += f",{FailPoint.COPIED}+1=raise"
            # What is parked does not depend on how fast this machine copies.
            arguments = ("--failpoints", points, "--strict", "--link-bytes-per-s", "1e12")
            memory = PAGES * PAGE
            async with worker_process(runtime_dir, *arguments, memory_bytes=memory) as worker:
                # Each finds the sockets of one that was killed, and the same descriptors.
                hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
                for model in (prose, verse):
                    await hotbayd.attach(model.image)
                if point not in KV_ONLY:
                    assert (await hotbayd.exchange(load(prose.key, prose.image))).error == ""
                    answer = await gateway.run(prose.key, PROMPTS[0], greedy(8))
                    assert answer.tokens == prose.expected(PROMPTS[0], 8)
                with pytest.raises(LinkError):
                    await until_killed(hotbayd, gateway, point, verse, tale, prose)
                assert await worker.ended() == -signal.SIGKILL, point

    asyncio.run(run())
