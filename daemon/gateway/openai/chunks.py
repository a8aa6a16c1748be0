"""The JSON of answers, whole and streamed, for both endpoints.

A streamed token costs one JSON string between a prefix and a suffix that were written when the
request began. Where usage was asked for, every chunk carries `usage: null` but the last, which has
the counts and no choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from daemon.gateway.openai.choice import Choice
from daemon.gateway.openai.logprobs import chat_logprobs, completion_logprobs
from daemon.gateway.tokens.tokenizer import ModelTokenizer

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Usage:
    """Tokens counted for one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def object(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


class Style(Protocol):
    """How one endpoint writes the answer to one request."""

    def opening(self, choice: Choice) -> bytes:
        """The first event of a choice."""

    def delta(self, choice: Choice, text: str) -> bytes:
        """Further text; empty when there is nothing to say."""

    def closing(self, choice: Choice) -> bytes:
        """The event with the finish reason."""

    def usage(self, usage: Usage) -> bytes:
        """The event with the counts."""

    def whole(self, choices: list[tuple[Choice, str]], usage: Usage) -> bytes:
        """The answer in one piece."""


class _Base:
    """What both styles share: the envelope."""

    chunk_object: str
    whole_object: str
    delta_head: bytes
    """Between a choice's index and its text."""
    delta_tail: bytes
    """Between a choice's text and its logprobs."""

    def __init__(
        self,
        *,
        identifier: str,
        created_s: int,
        model: str,
        tokenizer: ModelTokenizer,
        choices: int,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._envelope = {"id": identifier, "created": created_s, "model": model}
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage
        head = event({**self._chunk(), "choices": []})[: -len(b"]}\n\n")]
        self._heads = [head + b'{"index":%d,' % index + self.delta_head for index in range(choices)]
        usage = b',"usage":null' if include_usage else b""
        self._end = b',"finish_reason":null}]' + usage + b"}\n\n"
        self._tail = self.delta_tail + b'"logprobs":null' + self._end

    def _chunk(self) -> dict[str, Any]:
        return {**self._envelope, "object": self.chunk_object}

    def _event(self, choice: dict[str, Any]) -> bytes:
        chunk: dict[str, Any] = {**self._chunk(), "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return event(chunk)

    def delta(self, choice: Choice, text: str) -> bytes:
        if not self._logprobs:
            return self._heads[choice.index] + _encode(text) + self._tail if text else b""
        if not text and not choice.entries:
            return b""
        logprobs = _encode(self.logprobs_object(choice))
        return (
            self._heads[choice.index]
            + _encode(text)
            + self.delta_tail
            + b'"logprobs":'
            + logprobs
            + self._end
        )

    def usage(self, usage: Usage) -> bytes:
        return event({**self._chunk(), "choices": [], "usage": usage.object()})

    def whole(self, choices: list[tuple[Choice, str]], usage: Usage) -> bytes:
        return _encode(
            {
                **self._envelope,
                "object": self.whole_object,
                "choices": [self.whole_choice(choice, text) for choice, text in choices],
                "usage": usage.object(),
            }
        )

    def logprobs_object(self, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        raise NotImplementedError


class ChatStyle(_Base):
    """/v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    delta_head = b'"delta":{"content":'
    delta_tail = b"},"

    def opening(self, choice: Choice) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return self._event(
            {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        )

    def closing(self, choice: Choice) -> bytes:
        return self._event(
            {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish}
        )

    def logprobs_object(self, choice: Choice) -> dict[str, Any]:
        return chat_logprobs(choice.entries, self._tokenizer)

    def whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self.logprobs_object(choice) if self._logprobs else None,
            "finish_reason": choice.finish,
        }


class CompletionStyle(_Base):
    """/v1/completions."""

    chunk_object = "text_completion"
    whole_object = "text_completion"
    delta_head = b'"text":'
    delta_tail = b","

    def opening(self, choice: Choice) -> bytes:
        return b""

    def closing(self, choice: Choice) -> bytes:
        return self._event(
            {"index": choice.index, "text": "", "logprobs": None, "finish_reason": choice.finish}
        )

    def logprobs_object(self, choice: Choice) -> dict[str, Any]:
        return completion_logprobs(choice.entries, self._tokenizer)

    def whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self.logprobs_object(choice) if self._logprobs else None,
            "finish_reason": choice.finish,
        }
