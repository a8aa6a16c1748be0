"""The real openai client against a real gateway with a scripted worker."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from engine.link.tokens import Finish, Submit, TokenLogprob
from tests.gateway.conftest import CHAT
from tests.support.gateway_stage import GatewayStage, until
from tests.support.scripted_worker import Script

Ids = Callable[[str], tuple[int, ...]]


@pytest.fixture
def client(stage: GatewayStage) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=stage.http + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{**CHAT, **fields})


def test_a_whole_chat(
    client: openai.OpenAI, stage: GatewayStage, say: Callable[..., None], ids: Ids
) -> None:
    say("the answer is 42 — 你好 🙂", cached_tokens=2)
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.model == "fox"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "the answer is 42 — 你好 🙂"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    submit = stage.workers["gpu0"].submits[0]
    assert submit.model == "fox@1"
    assert submit.prompt == (0, 3, *ids("hello"), 1, 4)
    assert answer.usage.prompt_tokens == len(submit.prompt)
    assert answer.usage.completion_tokens == len(ids("the answer is 42 — 你好 🙂"))
    assert answer.usage.total_tokens == len(submit.prompt) + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_a_streamed_chat(client: openai.OpenAI, say: Callable[..., None], ids: Ids) -> None:
    say("the fox 🙂", finish=Finish.LENGTH)
    chunks = list(chat(client, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    contents = [chunk.choices[0].delta.content for chunk in chunks[1:-1]]
    assert "".join(contents) == "the fox 🙂"
    assert len(contents) > 1
    assert all(contents)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].delta.content is None
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_and_alone(
    client: openai.OpenAI, say: Callable[..., None], ids: Ids
) -> None:
    say("the fox")
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == len(ids("the fox"))


def test_the_bytes_of_a_stream(stage: GatewayStage, say: Callable[..., None]) -> None:
    say("fox")
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    answer = stage.client.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert all('"usage":null' in event for event in events[:-3])
    assert answer.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("stream", [False, True])
def test_samples_get_seeds_of_their_own_and_keep_apart(
    client: openai.OpenAI, stage: GatewayStage, ids: Ids, stream: bool
) -> None:
    texts = ["the fox", "a dog and more", "42"]

    def answer(submit: Submit) -> Script:
        return Script(tokens=ids(texts[len(stage.workers["gpu0"].submits) % 3 - 1]))

    stage.workers["gpu0"].script.answer = answer
    result = chat(client, n=3, seed=5, stream=stream)
    found = ["", "", ""]
    if stream:
        for chunk in result:
            choice = chunk.choices[0]
            found[choice.index] += choice.delta.content or ""
    else:
        found = [choice.message.content for choice in result.choices]
        assert result.usage.completion_tokens == sum(len(ids(text)) for text in texts)
    assert found == texts
    seeds = [submit.sampling.seed for submit in stage.workers["gpu0"].submits]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_prompts_come_in_four_forms(
    client: openai.OpenAI, stage: GatewayStage, say: Callable[..., None], ids: Ids
) -> None:
    say("fox")
    forms: list[tuple[Any, list[tuple[int, ...]]]] = [
        ("the dog", [(0, *ids("the dog"))]),
        (["the", "dog"], [(0, *ids("the")), (0, *ids("dog"))]),
        ([7, 8, 9], [(7, 8, 9)]),
        ([[7, 8], [9]], [(7, 8), (9,)]),
    ]
    for prompt, expected in forms:
        stage.workers["gpu0"].submits.clear()
        answer = client.completions.create(model="owl", prompt=prompt, n=2)
        submits = stage.workers["gpu0"].submits
        assert [submit.prompt for submit in submits] == [p for p in expected for _ in range(2)]
        assert [choice.index for choice in answer.choices] == list(range(2 * len(expected)))
        assert {choice.text for choice in answer.choices} == {"fox"}
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, expected))
        assert {submit.model for submit in submits} == {"owl@2"}


def test_a_streamed_completion(client: openai.OpenAI, say: Callable[..., None]) -> None:
    say("the quick fox")
    chunks = list(client.completions.create(model="fox@1", prompt="x", stream=True))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == "the quick fox"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_ends_the_text_and_the_worker(
    client: openai.OpenAI, stage: GatewayStage, ids: Ids, stream: bool
) -> None:
    tokens = tuple(token for letter in "abcSTOPxyz" for token in ids(letter))
    assert len(tokens) == 10
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=tokens, finish=None)
    result = chat(client, stop=["STOP", "never"], stream=stream)
    if stream:
        chunks = list(result)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = result.choices[0].message.content
        assert result.choices[0].finish_reason == "stop"
        assert result.usage.completion_tokens == 7
    assert text == "abc"
    until(
        lambda: stage.workers["gpu0"].cancels == [stage.workers["gpu0"].submits[0].request],
        "a cancel",
    )


def test_a_prefix_of_a_stop_string_is_held_until_it_is_none(
    client: openai.OpenAI, stage: GatewayStage, ids: Ids
) -> None:
    tokens = tuple(token for letter in "aSTOa" for token in ids(letter))
    stage.workers["gpu0"].script.answer = lambda _: Script(tokens=tokens)
    chunks = [
        chunk.choices[0].delta.content
        for chunk in chat(client, stop="STOP", stream=True)
        if chunk.choices[0].delta.content
    ]
    assert chunks[0] == "a"
    assert "".join(chunks) == "aSTOa"
    assert not {"S", "T", "O"} & set(chunks)


def logprob_script(ids: Ids, text: str) -> Script:
    tokens = ids(text)
    return Script(
        tokens=tokens,
        logprobs=tuple(
            TokenLogprob(-0.5 * place, ((token, -0.5 * place), (5, -math.inf)))
            for place, token in enumerate(tokens)
        ),
    )


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(
    client: openai.OpenAI, stage: GatewayStage, ids: Ids, stream: bool
) -> None:
    text = "the fox 🙂"
    stage.workers["gpu0"].script.answer = lambda _: logprob_script(ids, text)
    result = chat(client, logprobs=True, top_logprobs=2, stream=stream)
    content = []
    if stream:
        for chunk in result:
            if chunk.choices[0].logprobs:
                content += chunk.choices[0].logprobs.content
    else:
        content = result.choices[0].logprobs.content
    assert stage.workers["gpu0"].submits[0].sampling.logprobs == 2
    assert b"".join(bytes(entry.bytes) for entry in content) == text.encode()
    assert [entry.logprob for entry in content] == [-0.5 * i for i in range(len(ids(text)))]
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert content[0].top_logprobs[1].token == "!"
    assert content[0].top_logprobs[1].logprob == -9999.0


def test_log_probabilities_stop_where_the_text_does(
    client: openai.OpenAI, stage: GatewayStage, ids: Ids
) -> None:
    stage.workers["gpu0"].script.answer = lambda _: logprob_script(ids, "the lazy dog over")
    answer = chat(client, logprobs=True, stop=" dog")
    choice = answer.choices[0]
    assert choice.message.content == "the lazy"
    assert "".join(entry.token for entry in choice.logprobs.content) == "the lazy"


def test_log_probabilities_of_a_completion(
    client: openai.OpenAI, stage: GatewayStage, ids: Ids
) -> None:
    stage.workers["gpu0"].script.answer = lambda _: logprob_script(ids, "the fox")
    answer = client.completions.create(model="fox", prompt="x", logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == "the fox"
    offsets = [
        len("".join((found.tokens or [])[:place])) for place in range(len(found.tokens or []))
    ]
    assert found.text_offset == offsets
    assert (found.token_logprobs or [])[1] == -0.5
    assert (found.top_logprobs or [])[0]["!"] == -9999.0


def test_models(client: openai.OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"fox", "owl"}
    assert models["fox"].object == "model"
    assert models["fox"].created == 1_700_000_000
    found = client.models.retrieve("owl@2").model_dump()
    assert found["id"] == "owl"
    assert found["state"] == "ACTIVE"
    assert found["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("bat")


def test_an_unknown_model_is_refused_at_once(client: openai.OpenAI, stage: GatewayStage) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="bat")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert not stage.workers["gpu0"].submits


def test_the_asynchronous_client_and_many_streams_at_once(stage: GatewayStage, ids: Ids) -> None:
    """32 streams over two models: each gets its own model's tokens, whole and in order."""
    texts = {"fox@1": "the quick brown fox jumps", "owl@2": "over the lazy dog 🙂🙂"}
    stage.workers["gpu0"].script.answer = lambda submit: Script(tokens=ids(texts[submit.model]))

    async def one(client: openai.AsyncOpenAI, model: str) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hello"}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        url = stage.http + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, model) for model in ["fox", "owl@2"] * 16))

    assert asyncio.run(all_of_them()) == [texts["fox@1"], texts["owl@2"]] * 16
