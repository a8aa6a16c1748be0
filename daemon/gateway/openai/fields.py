"""The request bodies, as strict structs whose bounds are part of their types.

Decoding either gives a request in which every bound named here holds, or raises BadRequest with the
field's path in `param`. Fields that exist elsewhere and are not supported here are listed with the
values that ask for nothing; any other value is refused rather than ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from daemon.gateway.errors import BadRequest
from daemon.gateway.web.exchange import check_text
from engine.link.tokens import LOGIT_BIAS_MAX, LOGPROBS_MAX, STOP_TOKENS_MAX

STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
SAMPLES_MAX = 128
TOP_K_MAX = 1 << 20
PRIORITY_MAX = 1 << 30
CACHE_SALT_CHARACTERS_MAX = 256
MODEL_CHARACTERS_MAX = 512

Stop = Annotated[str, Meta(min_length=1, max_length=STOP_CHARACTERS_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class CommonFields(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and plain completions share."""

    model: Annotated[str, Meta(min_length=1, max_length=MODEL_CHARACTERS_MAX)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=SAMPLES_MAX)] | None = None
    max_tokens: Count | None = None
    min_tokens: NotNegative | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=TOP_K_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=STOPS_MAX)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=STOP_TOKENS_MAX)] | None = None
    ignore_eos: bool | None = None
    logit_bias: (
        Annotated[
            dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=LOGIT_BIAS_MAX)
        ]
        | None
    ) = None
    priority: Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=CACHE_SALT_CHARACTERS_MAX)] | None = (
        None
    )

    # Not supported: see UNSUPPORTED.
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    suffix: Any = None
    echo: Any = None
    best_of: Annotated[int, Meta(ge=1, le=SAMPLES_MAX)] | None = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None
    use_beam_search: Any = None
    prompt_logprobs: Any = None
    prompt_embeds: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None
    chat_template: Any = None


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "echo": (False,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
}
"""Fields not supported yet, with the values besides null that ask for nothing."""


class ChatFields(CommonFields, frozen=True, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionFields(CommonFields, frozen=True, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None


Fields = TypeVar("Fields", bound=CommonFields)

_PATH = re.compile(r" - at `(?:key` in `)?\$\.?([^`]*)`$")
_MISSING = re.compile(r"missing required field `([^`]+)`")


class BodyDecoder:
    """Decodes and checks the bodies of both endpoints."""

    def __init__(self) -> None:
        self._chat = msgspec.json.Decoder(ChatFields)
        self._completion = msgspec.json.Decoder(CompletionFields)

    def chat(self, body: bytes) -> ChatFields:
        """A chat request. Raises BadRequest."""
        fields = _decode(self._chat, body)
        if fields.top_logprobs is not None and not fields.logprobs:
            raise BadRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return fields

    def completion(self, body: bytes) -> CompletionFields:
        """A completion request. Raises BadRequest."""
        return _decode(self._completion, body)


def _decode(decoder: msgspec.json.Decoder[Fields], body: bytes) -> Fields:
    check_text(body)
    try:
        fields = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply", code="invalid_json") from None
    _check_unsupported(fields)
    if fields.stream_options is not None and not fields.stream:
        raise BadRequest(
            "stream_options: only goes with stream set to true", param="stream_options"
        )
    return fields


def _invalid(message: str) -> BadRequest:
    path = _PATH.search(message)
    param = path.group(1) if path else ""
    missing = _MISSING.search(message)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return BadRequest(f"{param}: this field is required", param=param)
    text = _PATH.sub("", message)
    text = text[:1].lower() + text[1:]
    return BadRequest(f"{param}: {text}" if param else text, param=param or None)


def _check_unsupported(fields: CommonFields) -> None:
    for name, neutral in UNSUPPORTED.items():
        value = getattr(fields, name)
        if value is not None and not any(value == known for known in neutral):
            raise BadRequest(
                f"{name}: not supported by this server; leave it out",
                param=name,
                code="unsupported_parameter",
            )
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise BadRequest(
            f"best_of: {fields.best_of} is not n ({fields.n or 1}), and choosing among more "
            "samples than are returned is not supported",
            param="best_of",
            code="unsupported_parameter",
        )
