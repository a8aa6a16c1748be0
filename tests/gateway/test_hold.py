"""Requests whose model is not served: held in order, bounded, reported, released."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.link.routes import Disposition
from engine.link.tokens import Finish, Output, Submit
from tests.gateway.conftest import CHAT, hold, serve
from tests.support.gateway_stage import GatewayStage, until
from tests.support.scripted_worker import Script

Ids = Callable[[str], tuple[int, ...]]
PATH = "/v1/chat/completions"


@pytest.fixture
def pool() -> Any:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def post(stage: GatewayStage, pool: ThreadPoolExecutor, **fields: Any) -> Future[httpx.Response]:
    return pool.submit(stage.client.post, PATH, json={**CHAT, **fields})


def demand(stage: GatewayStage) -> dict[str, int]:
    """The last demand reported, as model to requests."""
    reports = list(stage.daemon.demands)
    return {model.model: model.requests for model in reports[-1].models} if reports else {}


def test_held_requests_flow_in_order_when_the_route_opens(
    stage: GatewayStage,
    say: Callable[..., None],
    pool: ThreadPoolExecutor,
    ids: Ids,
    model_directory: Path,
) -> None:
    say("fox")
    hold(stage, "fox@1", model_directory)
    answers = []
    for number in range(8):
        answers.append(post(stage, pool, max_tokens=number + 1))
        until(lambda n=number: demand(stage) == {"fox@1": n + 1}, "the demand is reported")
    assert stage.gauge("hotbay_held_requests") == 8
    assert not stage.workers["gpu0"].submits
    assert not any(answer.done() for answer in answers)
    # A model that is served is not in the way of one that is not, nor the other way round.
    assert stage.client.post(PATH, json={**CHAT, "model": "owl"}).status_code == 200
    stage.workers["gpu0"].submits.clear()
    serve(stage, "fox@1", model_directory)
    assert {answer.result(10).status_code for answer in answers} == {200}
    order = [submit.sampling.max_tokens for submit in stage.workers["gpu0"].submits]
    assert order == list(range(1, 9))
    until(lambda: stage.daemon.demands[-1].models == (), "demand ended is reported")
    assert stage.gauge("hotbay_held_requests") == 0


def test_a_stream_that_is_held_begins_only_when_it_is_served(
    stage: GatewayStage, say: Callable[..., None], model_directory: Path
) -> None:
    say("fox")
    hold(stage, "fox@1", model_directory)
    opened = threading.Thread(
        target=lambda: (
            until(lambda: demand(stage) == {"fox@1": 1}, "held"),
            serve(stage, "fox@1", model_directory),
        )
    )
    opened.start()
    with stage.client.stream("POST", PATH, json={**CHAT, "stream": True}) as answer:
        assert answer.status_code == 200
        assert b"[DONE]" in answer.read()
    opened.join()


def test_the_queue_is_bounded(
    stage: GatewayStage, say: Callable[..., None], pool: ThreadPoolExecutor, model_directory: Path
) -> None:
    say("fox")
    stage.send_table(held_requests_max=2)
    hold(stage, "fox@1", model_directory)
    held = [post(stage, pool) for _ in range(2)]
    until(lambda: demand(stage) == {"fox@1": 2}, "two are held")
    refused = stage.client.post(PATH, json=CHAT)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "hold_queue_full"
    assert int(refused.headers["retry-after"]) > 0
    # One request of several sequences is held as a whole or not at all.
    assert stage.client.post(PATH, json={**CHAT, "n": 2}).status_code == 503
    assert demand(stage) == {"fox@1": 2}
    serve(stage, "fox@1", model_directory)
    assert [answer.result(10).status_code for answer in held] == [200, 200]


def test_holding_ends_in_time(stage: GatewayStage, model_directory: Path) -> None:
    stage.send_table(hold_timeout_s=0.2)
    hold(stage, "fox@1", model_directory)
    for fields in ({}, {"stream": True}):
        answer = stage.client.post(PATH, json={**CHAT, **fields})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "hold_timeout"
        assert "STANDBY" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) > 0
    assert stage.gauge("hotbay_held_requests") == 0


def test_a_client_that_goes_away_is_held_no_more(
    stage: GatewayStage, model_directory: Path
) -> None:
    hold(stage, "fox@1", model_directory)
    with pytest.raises(httpx.ReadTimeout):
        stage.client.post(PATH, json=CHAT, timeout=0.2)
    until(lambda: stage.gauge("hotbay_held_requests") == 0, "nothing is held")
    until(lambda: demand(stage) == {}, "no demand")


@pytest.mark.parametrize(
    ("change", "status"),
    [({"disposition": Disposition.REFUSE, "reason": "broken"}, 503), ({}, 404)],
)
def test_a_model_that_fails_or_goes_ends_what_is_held(
    stage: GatewayStage,
    pool: ThreadPoolExecutor,
    model_directory: Path,
    change: dict[str, Any],
    status: int,
) -> None:
    hold(stage, "fox@1", model_directory)
    answer = post(stage, pool)
    until(lambda: demand(stage) == {"fox@1": 1}, "held")
    if change:
        stage.route("fox@1", model_directory, **change)
    else:
        del stage.routes["fox@1"]
    stage.send_table()
    assert answer.result(10).status_code == status
    until(lambda: demand(stage) == {}, "no demand")


def test_what_a_worker_sends_back_is_sent_again_in_order(
    stage: GatewayStage, pool: ThreadPoolExecutor, ids: Ids, model_directory: Path
) -> None:
    """A swap begins at the worker before the gateway hears of it."""
    stage.workers["gpu0"].script.answer = lambda _: Script(finish=Finish.REQUEUE)
    answers = [post(stage, pool, max_tokens=number) for number in (1, 2, 3)]
    until(lambda: len(stage.workers["gpu0"].submits) >= 3, "all were sent")
    hold(stage, "fox@1", model_directory)
    until(lambda: demand(stage) == {"fox@1": 3}, "all are held")
    stage.workers["gpu0"].submits.clear()
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("fox"))
    serve(stage, "fox@1", model_directory)
    assert {answer.result(10).status_code for answer in answers} == {200}
    requests = [submit.request for submit in stage.workers["gpu0"].submits]
    assert len(requests) == len(set(requests)) == 3


def test_a_worker_that_is_full_is_asked_again_without_a_new_table(
    stage: GatewayStage, ids: Ids
) -> None:
    seen: list[Submit] = []

    def answer(submit: Submit) -> Script:
        seen.append(submit)
        full = len(seen) <= 3
        return Script(finish=Finish.REQUEUE) if full else Script(tokens=ids("fox"))

    stage.workers["gpu0"].script.answer = answer
    assert stage.client.post(PATH, json=CHAT).status_code == 200
    assert len(seen) == 4


def test_requests_parked_at_a_worker_count_as_demand(
    stage: GatewayStage, pool: ThreadPoolExecutor, ids: Ids, model_directory: Path
) -> None:
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=ids("fox"), finish=None)
    answer = post(stage, pool, stop="never")
    until(lambda: stage.workers["gpu0"].submits, "sent")
    assert demand(stage) == {}
    hold(stage, "fox@1", model_directory)
    until(lambda: demand(stage) == {"fox@1": 1}, "parked demand")
    first = stage.daemon.demands[-1].models[0].oldest_s
    until(lambda: stage.daemon.demands[-1].models[0].oldest_s >= first + 0.9, "told each second")
    stage.do(_finish(stage))
    assert answer.result(10).json()["choices"][0]["message"]["content"] == "fox"
    until(lambda: demand(stage) == {}, "no demand")


async def _finish(stage: GatewayStage) -> None:
    worker = stage.workers["gpu0"]
    worker.send(Output(request=worker.submits[-1].request, finish=Finish.STOP))


def test_requests_of_a_worker_that_is_away_wait_for_it(
    stage: GatewayStage, pool: ThreadPoolExecutor, ids: Ids
) -> None:
    script = stage.workers["gpu0"].script
    stage.do(stage.workers.pop("gpu0").stop())
    until(lambda: stage.gauge("hotbay_worker_links") == 0, "the link is down")
    assert stage.client.get("/readyz").status_code == 503
    answer = post(stage, pool)
    until(lambda: stage.gauge("hotbay_held_requests") == 1, "held")
    script.answer = lambda _: Script(tokens=ids("fox"))
    stage.worker("gpu0", script)  # the same socket again, and no new table
    assert answer.result(10).status_code == 200
    assert stage.client.get("/readyz").status_code == 200
