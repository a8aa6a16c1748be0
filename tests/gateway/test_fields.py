"""Request bodies: what is taken, and that whatever is wrong names its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from daemon.gateway.errors import BadRequest
from daemon.gateway.openai.fields import UNSUPPORTED, BodyDecoder, CommonFields
from daemon.gateway.openai.sampling import make_sampling, sample_seeds, stop_strings
from engine.link.tokens import Sampling

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "x"}


def chat(**fields: Any) -> CommonFields:
    return BodyDecoder().chat(json.dumps({**CHAT, **fields}).encode())


def plain(**fields: Any) -> CommonFields:
    return BodyDecoder().completion(json.dumps({**PLAIN, **fields}).encode())


def sampling(fields: CommonFields, prompt_tokens: int = 10, context_tokens: int = 100) -> Sampling:
    return make_sampling(
        fields,
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
        output_tokens_default=50,
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"model": ""}, "model"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "ten"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": "lucky"}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a"] * 10_000}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": ["a" * 257]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {str(token): 0 for token in range(301)}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"priority": "high"}, "priority"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert (caught.value.param or "").split("[...]")[0] == param
    assert str(caught.value).startswith(param.split("[")[0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True}, "echo"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        plain(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != missing}
    with pytest.raises(BadRequest, match="required") as caught:
        BodyDecoder().chat(json.dumps(body).encode())
    assert caught.value.param == missing


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model":"m","messages":[]} x', "invalid_json"),
        (b'{"model":"m","x":NaN}', "invalid_json"),
        (b'{"model":"m","x":' + b"[" * 100_000, "invalid_json"),
        (b'{"model":"\\ud800"}', "invalid_json"),
        (b'{"model":"\xff"}', "invalid_utf8"),
        (b'{"model":"m","unknown":"\xff"}', "invalid_utf8"),
    ],
)
def test_a_body_that_is_no_json_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(BadRequest) as caught:
        BodyDecoder().chat(body)
    assert caught.value.code == code


def test_unknown_fields_and_nulls_are_ignored() -> None:
    nulls = dict.fromkeys(UNSUPPORTED) | dict.fromkeys(("stop", "n", "seed", "temperature"))
    fields = chat(**nulls, user="me", reasoning_effort="low", metadata={"a": [1]})
    assert sampling(fields) == Sampling(max_tokens=50)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields_may_ask_for_nothing(name: str) -> None:
    for value in UNSUPPORTED[name]:
        assert chat(**{name: value}).model == "m"
    with pytest.raises(BadRequest, match="not supported") as caught:
        chat(**{name: {"asks": "for something"}})
    assert caught.value.param == name


def test_every_parameter_reaches_the_engine() -> None:
    fields = chat(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        ignore_eos=True,
        stop_token_ids=[3, 4],
        logit_bias={"5": -100, "6": 1.5},
        logprobs=True,
        top_logprobs=4,
    )
    assert sampling(fields) == Sampling(
        max_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.1,
        ignore_eos=True,
        stop_token_ids=(3, 4),
        logit_bias={5: -100.0, 6: 1.5},
        logprobs=4,
    )


def test_max_completion_tokens_comes_before_max_tokens() -> None:
    assert sampling(chat(max_tokens=5, max_completion_tokens=9)).max_tokens == 9


def test_without_a_maximum_the_context_and_the_default_bound_the_answer() -> None:
    assert sampling(chat(), prompt_tokens=10).max_tokens == 50
    assert sampling(chat(), prompt_tokens=80).max_tokens == 20


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens"])
def test_more_than_the_context_is_refused_with_the_figures(param: str) -> None:
    assert sampling(chat(**{param: 90})).max_tokens == 90
    with pytest.raises(BadRequest, match=r"91 .* 10 .* 100 tokens; at most 90") as caught:
        sampling(chat(**{param: 91}))
    assert caught.value.param == param
    assert caught.value.code == "context_length_exceeded"


def test_min_tokens_may_not_exceed_the_maximum() -> None:
    with pytest.raises(BadRequest) as caught:
        sampling(chat(max_tokens=3, min_tokens=4))
    assert caught.value.param == "min_tokens"


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        (chat(), None),
        (chat(logprobs=False), None),
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=20), 20),
        (plain(), None),
        (plain(logprobs=0), 0),
        (plain(logprobs=5), 5),
    ],
)
def test_log_probabilities_are_asked_for_in_either_style(
    fields: CommonFields, logprobs: int | None
) -> None:
    assert sampling(fields).logprobs == logprobs


def test_seeds_of_samples_follow_from_the_clients() -> None:
    seeds = sample_seeds(7, 64)
    assert seeds[0] == 7
    assert len(set(seeds)) == 64
    assert seeds[:3] == sample_seeds(7, 3)
    assert set(seeds).isdisjoint(sample_seeds(8, 64))
    assert all(0 <= seed < 1 << 63 for seed in [*seeds, *sample_seeds(-1, 9)])
    assert sample_seeds(None, 2) != sample_seeds(None, 2)


def test_stop_strings_come_alone_or_in_a_list() -> None:
    assert stop_strings(chat()) == ()
    assert stop_strings(chat(stop="a")) == ("a",)
    assert stop_strings(chat(stop=["a", "b"])) == ("a", "b")
    assert len(stop_strings(chat(stop=["a" * 256] * 16))) == 16
