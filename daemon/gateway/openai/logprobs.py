"""Log probabilities in OpenAI's two styles, released together with the text they belong to.

A token's entry waits as long as its text is held back for a stop string, and is dropped with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from daemon.gateway.tokens.tokenizer import ModelTokenizer
from engine.link.tokens import TokenLogprob

LOGPROB_MIN = -9999.0
"""What OpenAI writes for a probability of zero; JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One token: where its text begins in the choice's text, and its log probabilities."""

    offset: int
    token: int
    logprob: TokenLogprob


class LogprobLog:
    """The entries of one choice, in order."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Entry] = []

    def add(self, offset: int, token: int, logprob: TokenLogprob) -> None:
        """Note a token whose text begins at `offset`."""
        self._waiting.append(Entry(offset, token, logprob))

    def take(self, shown: int, *, all_shown: bool) -> list[Entry]:
        """The entries whose text is out: begun before `shown`, or all when nothing is held."""
        count = len(self._waiting)
        if not all_shown:
            count = sum(entry.offset < shown for entry in self._waiting)
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def chat_logprobs(entries: list[Entry], tokenizer: ModelTokenizer) -> dict[str, Any]:
    """The `logprobs` of a chat choice or chunk."""

    def item(token: int, logprob: float) -> dict[str, Any]:
        spelling = tokenizer.spelling(token)
        return {
            "token": spelling.decode(errors="replace"),
            "logprob": max(logprob, LOGPROB_MIN),
            "bytes": list(spelling),
        }

    content = [
        {
            **item(entry.token, entry.logprob.logprob),
            "top_logprobs": [item(token, value) for token, value in entry.logprob.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: list[Entry], tokenizer: ModelTokenizer) -> dict[str, Any]:
    """The `logprobs` of a completion choice or chunk."""

    def text(token: int) -> str:
        return tokenizer.spelling(token).decode(errors="replace")

    tops: list[dict[str, float] | None] = []
    for entry in entries:
        top = {text(token): max(value, LOGPROB_MIN) for token, value in entry.logprob.top}
        if top:
            top.setdefault(text(entry.token), max(entry.logprob.logprob, LOGPROB_MIN))
        tops.append(top or None)
    return {
        "tokens": [text(entry.token) for entry in entries],
        "token_logprobs": [max(entry.logprob.logprob, LOGPROB_MIN) for entry in entries],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }
