"""run: one prompt to one model through the gateway, streamed as it comes.

It speaks the OpenAI protocol with the standard library's HTTP client, to the address that GetNode
names, as any other client would. It holds no conversation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import urlsplit

from daemon.gpuctl.console import complain, print_line, print_part
from daemon.gpuctl.errors import CommandFailed
from daemon.gpuctl.exits import Exit
from daemon.gpuctl.session import Session

# A held request may wait for a swap; the gateway answers 503 long before this.
ANSWER_TIMEOUT_S = 300.0
PROMPT_BYTES_MAX = 1024 * 1024
ANSWER_BYTES_MAX = 16 * 1024 * 1024
LINE_BYTES_MAX = 1024 * 1024
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}

BY_HTTP_STATUS = {
    400: Exit.USAGE, 401: Exit.DENIED, 403: Exit.DENIED, 404: Exit.NOT_FOUND,
    408: Exit.TIMED_OUT, 409: Exit.CONFLICT, 413: Exit.USAGE, 422: Exit.USAGE,
    429: Exit.NO_CAPACITY, 503: Exit.NO_CAPACITY, 504: Exit.TIMED_OUT,
}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """What to ask a model, and how. None leaves the choice to the model."""

    model: str
    prompt: str
    raw: bool
    system: str | None
    max_tokens: int | None
    temperature: float | None
    seed: int | None

    @property
    def path(self) -> str:
        """Where to post it."""
        return "/v1/completions" if self.raw else "/v1/chat/completions"

    def body(self, *, stream: bool) -> bytes:
        """The request's JSON."""
        fields: dict[str, object] = {"model": self.model, "stream": stream}
        if self.raw:
            fields["prompt"] = self.prompt
        else:
            system = [{"role": "system", "content": self.system}] if self.system else []
            fields["messages"] = [*system, {"role": "user", "content": self.prompt}]
        for name in ("max_tokens", "temperature", "seed"):
            value = getattr(self, name)
            if value is not None:
                fields[name] = value
        return json.dumps(fields).encode()


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for `-`."""
    if prompt != "-":
        return prompt
    text = sys.stdin.buffer.read(PROMPT_BYTES_MAX + 1)
    if len(text) > PROMPT_BYTES_MAX:
        raise CommandFailed(f"the prompt exceeds {PROMPT_BYTES_MAX} bytes", Exit.USAGE)
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise CommandFailed(f"the prompt is not UTF-8: {error}", Exit.USAGE) from error


def run_prompt(session: Session, ask: Ask) -> None:
    """`gpuctl run`."""
    session.names = [ask.model]
    address = session.client.node().http_address
    if not address:
        raise CommandFailed("the node names no HTTP address; its gateway is off", Exit.CONFLICT)
    connection = _connect(address, session.timeout_s)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", ask.path, ask.body(stream=not session.json), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise _refused(session, ask, response)
        if session.json:
            print_line(response.read(ANSWER_BYTES_MAX).decode())
            return
        for text in pieces(response):
            print_part(text)
        print_line()
    except TimeoutError as error:
        raise CommandFailed(f"{address} gave no answer in time", Exit.TIMED_OUT) from error
    except (OSError, HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise CommandFailed(f"the gateway at {address}: {reason}", Exit.UNREACHABLE) from error
    finally:
        connection.close()


def pieces(response: HTTPResponse) -> Iterator[str]:
    """The text of a stream of server-sent events, as it comes. Raises CommandFailed on an error."""
    ended = False
    while line := response.readline(LINE_BYTES_MAX):
        field, _, value = line.decode("utf-8", "replace").partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            ended = True
            break
        event = json.loads(value)
        if "error" in event:
            raise CommandFailed(_error_message(event) or "the stream failed", Exit.FAILED)
        for choice in event.get("choices", ()):
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text:
                yield text
    if not ended:
        complain("")
        raise CommandFailed("the stream broke off before its end", Exit.FAILED)


def _connect(address: str, timeout_s: float | None) -> HTTPConnection:
    parts = urlsplit(address if "//" in address else f"//{address}")
    if parts.hostname is None:
        raise CommandFailed(f"the node's HTTP address {address!r} names no host", Exit.FAILED)
    host = EVERYWHERE.get(parts.hostname, parts.hostname)
    return HTTPConnection(host, parts.port or 80, timeout=timeout_s or ANSWER_TIMEOUT_S)


def _refused(session: Session, ask: Ask, response: HTTPResponse) -> CommandFailed:
    try:
        message = _error_message(json.loads(response.read(ANSWER_BYTES_MAX)))
    except ValueError:
        message = ""
    text = message or f"the gateway answered {response.status} {response.reason}"
    code = BY_HTTP_STATUS.get(response.status, Exit.FAILED)
    if response.status == 404:
        # The gateway knows no names but its own routes; the daemon knows what is alike.
        from hotbay.errors import HotbayError

        from daemon.gpuctl.suggest import model_names, nearest

        try:
            guess = nearest(ask.model, model_names(session.client.models()))
        except HotbayError:
            guess = None
        text += f"\n  did you mean {guess!r}?" if guess and guess != ask.model else ""
    after = response.headers.get("Retry-After")
    return CommandFailed(text + (f"\n  retry after {after} s" if after else ""), code)


def _error_message(body: object) -> str:
    """The message of an error in OpenAI's shape; empty for another shape."""
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        return str(body["error"].get("message") or "")
    return ""
