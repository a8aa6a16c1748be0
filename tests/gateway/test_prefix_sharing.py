"""What the gateway tells workers and clients about prompts that are computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from daemon.gateway.openai.salt import prefix_salt
from engine.link.tokens import Submit
from tests.gateway.conftest import CHAT
from tests.support.gateway_stage import GatewayStage
from tests.support.scripted_worker import Script

Ids = Callable[[str], tuple[int, ...]]


def chat(stage: GatewayStage, key: str | None = None, **fields: Any) -> Any:
    """The answer, or all chunks of a streamed one: they end with the client that reads them."""
    with openai.OpenAI(base_url=stage.http + "/v1", api_key=key or "none", max_retries=0) as client:
        answer = client.chat.completions.create(**{**CHAT, **fields})
        return list(answer) if fields.get("stream") else answer


def submits(stage: GatewayStage) -> list[Submit]:
    return stage.workers["gpu0"].submits


def test_salts_are_of_the_key_and_of_what_the_request_names(
    stage: GatewayStage, say: Callable[..., None]
) -> None:
    say("fox")
    for key, fields in (
        ("one", {}),
        ("two", {}),
        ("one", {"extra_body": {"cache_salt": "mine"}}),
        ("two", {"extra_body": {"cache_salt": "mine"}}),
        ("one", {}),
    ):
        chat(stage, key, **fields)
    salts = [submit.cache_salt for submit in submits(stage)]
    assert salts[4] == salts[0]
    assert len(set(salts)) == 4
    assert not any(word in salt for salt in salts for word in ("one", "two", "mine"))
    assert stage.client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert submits(stage)[-1].cache_salt == prefix_salt(None, None) == ""
    assert prefix_salt(None, "mine") not in salts


def test_priority_and_salt_travel_with_every_sample(
    stage: GatewayStage, say: Callable[..., None]
) -> None:
    say("fox")
    chat(stage, n=3, extra_body={"priority": 7, "cache_salt": "s"})
    assert [submit.priority for submit in submits(stage)] == [7, 7, 7]
    assert len({submit.cache_salt for submit in submits(stage)}) == 1


@pytest.mark.parametrize("salt", ["", "x" * 257, 5])
def test_a_salt_out_of_bounds_is_named(stage: GatewayStage, salt: object) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(stage, extra_body={"cache_salt": salt})
    assert caught.value.body["param"] == "cache_salt"


@pytest.fixture
def cached(stage: GatewayStage, ids: Ids) -> Callable[[list[int]], None]:
    """Have the worker find so many tokens for one request after the other."""

    def give(counts: list[int]) -> None:
        left = iter(counts)
        stage.workers["gpu0"].script.answer = lambda _: Script(
            tokens=ids("fox"), cached_tokens=next(left)
        )

    return give


@pytest.mark.parametrize("stream", [False, True])
def test_samples_that_share_their_own_prompt_count_no_tokens_as_cached(
    stage: GatewayStage, cached: Callable[[list[int]], None], stream: bool
) -> None:
    cached([1, 4, 4])
    if stream:
        options = {"include_usage": True}
        usage = chat(stage, n=3, stream=True, stream_options=options)[-1].usage
    else:
        usage = chat(stage, n=3).usage
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert usage.prompt_tokens == len(submits(stage)[0].prompt)


def test_prompts_of_one_request_are_counted_each(
    stage: GatewayStage, cached: Callable[[list[int]], None]
) -> None:
    cached([1, 2, 3, 2])
    with openai.OpenAI(base_url=stage.http + "/v1", api_key="none") as client:
        answer = client.completions.create(model="fox", prompt=["the fox", "the dog"], n=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1 + 2
