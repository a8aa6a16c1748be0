"""A lean HTTP client for load: many completion requests at a time, on few microseconds a token.

It exists because a convenient client costs more processor time than the server that is measured,
on the cores they share. One connection for each concurrent request, kept alive; streamed answers
are counted as they pass and parsed once at the end. It measures and reports and never judges:
errors are counted beside the rest. Invariant: every request gets exactly one `Answer`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

CONNECT_TIMEOUT_S = 10.0


@dataclass
class Answer:
    """How one request went. Times are seconds of the monotonic clock."""

    started_s: float
    first_byte_s: float = 0.0
    """First byte of the body: in a stream, the first token."""
    ended_s: float = 0.0
    status: int = 0
    error: str = ""
    """Empty when the answer was complete; else what was wrong with it."""
    tokens: int = 0
    text: str = ""
    """The first choice's text."""


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: Answer | None = None
        self._body: list[bytes] = []
        self._done: asyncio.Future[None] | None = None
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:
            self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._finish("the connection was closed before the answer was complete")

    # Called by the parser.

    def on_body(self, body: bytes) -> None:
        if self._answer is not None and not self._body:
            self._answer.first_byte_s = time.monotonic()
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._answer is not None and self._parser is not None:
            self._answer.status = self._parser.get_status_code()
            self.closed = self.closed or not self._parser.should_keep_alive()
        self._finish("")

    def _finish(self, error: str) -> None:
        if self._done is not None and not self._done.done():
            if self._answer is not None:
                self._answer.error = error
                self._answer.ended_s = time.monotonic()
            self._done.set_result(None)

    async def request(self, payload: bytes) -> tuple[Answer, bytes]:
        """Send a whole request and wait for the whole answer."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._answer = answer = Answer(started_s=time.monotonic())
        self._body = []
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(payload)
        await self._done
        return answer, b"".join(self._body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _read(answer: Answer, body: bytes) -> None:
    """Take text, tokens and errors out of a body, streamed or whole."""
    streamed = body.startswith(b"data: ")
    events = body.split(b"\n\n") if streamed else [body]
    texts = []
    for event in events:
        payload = event.removeprefix(b"data: ")
        if not payload or payload == b"[DONE]":
            continue
        try:
            message = json.loads(payload)
        except ValueError:
            answer.error = answer.error or f"not JSON: {payload[:100]!r}"
            return
        if "error" in message:
            answer.error = f"{answer.status} {message['error'].get('message')}"
        answer.tokens = (message.get("usage") or {}).get("completion_tokens", answer.tokens)
        for choice in message.get("choices", ()):
            if choice["index"] == 0:
                part = choice.get("delta") or choice.get("message") or {}
                texts.append(choice.get("text") or part.get("content") or "")
    answer.text = "".join(texts)
    if streamed and not answer.error and b"data: [DONE]" not in body[-32:]:
        answer.error = "the stream ended without [DONE]"


@dataclass(frozen=True)
class Load:
    """What to send: `bodies` in order, `concurrency` at a time, to `url` (with its path)."""

    url: str
    bodies: Sequence[dict[str, Any]]
    concurrency: int
    request_timeout_s: float = 300.0


@dataclass
class Report:
    """What came of it."""

    answers: list[Answer] = field(repr=False)
    wall_s: float

    @property
    def errors(self) -> list[str]:
        return [answer.error for answer in self.answers if answer.error]

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    def summary(self) -> dict[str, Any]:
        """Figures as plain data."""
        good = [answer for answer in self.answers if not answer.error]
        return {
            "requests": len(self.answers),
            "errors": dict(Counter(self.errors)),
            "tokens": self.tokens,
            "wall_s": self.wall_s,
            "tokens_per_s": self.tokens / self.wall_s,
            "first_byte_ms": quantiles(1e3 * (a.first_byte_s - a.started_s) for a in good),
            "latency_ms": quantiles(1e3 * (a.ended_s - a.started_s) for a in good),
        }


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile and maximum; empty without values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[int(share * (len(ordered) - 1))] for name, share in names.items()}


async def run_load(load: Load) -> Report:
    """Send everything and wait for every answer."""
    address = urlsplit(load.url)
    host, port = address.hostname or "127.0.0.1", address.port or 80
    waiting = list(enumerate(load.bodies))[::-1]
    answers: dict[int, tuple[Answer, bytes]] = {}
    loop = asyncio.get_running_loop()

    async def lane() -> None:
        connection: _Connection | None = None
        while waiting:
            place, body = waiting.pop()
            payload = _payload(address.path, host, body)
            started_s = time.monotonic()
            try:
                if connection is None or connection.closed:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        _, connection = await loop.create_connection(_Connection, host, port)
                async with asyncio.timeout(load.request_timeout_s):
                    answers[place] = await connection.request(payload)
            except (OSError, TimeoutError) as error:
                answer = Answer(started_s, ended_s=time.monotonic(), error=repr(error))
                answers[place] = (answer, b"")
                if connection is not None:
                    connection.close()
                    connection = None
        if connection is not None:
            connection.close()

    began_s = time.monotonic()
    await asyncio.gather(*(lane() for _ in range(load.concurrency)))
    wall_s = time.monotonic() - began_s
    for answer, body in answers.values():
        if body:
            _read(answer, body)
    return Report([answers[place][0] for place in sorted(answers)], wall_s)


def _payload(path: str, host: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def main() -> int:
    """Send the same chat request many times and print a JSON summary; 1 when any failed."""
    parser = argparse.ArgumentParser(description="Load an OpenAI-compatible server.")
    parser.add_argument("url", help="http://HOST:PORT")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", default="Tell me something.")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--plain", action="store_true", help="whole answers instead of streams")
    parser.add_argument("--answers", action="store_true", help="list every answer as well")
    arguments = parser.parse_args()
    body: dict[str, Any] = {
        "model": arguments.model,
        "messages": [{"role": "user", "content": arguments.prompt}],
        "max_tokens": arguments.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if not arguments.plain:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    url = arguments.url.rstrip("/") + "/v1/chat/completions"
    load = Load(url, [body] * arguments.requests, arguments.concurrency)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run_load(load))
    summary = report.summary()
    if arguments.answers:
        summary["answers"] = [asdict(answer) for answer in report.answers]
    json.dump(summary, sys.stdout, indent=2)
    print()
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
