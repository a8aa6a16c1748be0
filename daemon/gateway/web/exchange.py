"""One HTTP request and its answer, over ASGI.

It reads the body within a bound and a time, writes whole answers, streams and errors, and notices
that the client has gone; it knows no path and no model. Invariant: an answer is begun at most once,
and what fails after it was begun never changes its status.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from daemon.gateway.errors import (
    BadRequest,
    BodyTimedOut,
    BodyTooLarge,
    ClientGone,
    RequestFailed,
)

AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON: Header = (b"content-type", b"application/json")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def error_object(error: RequestFailed) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {
        "error": {
            "message": str(error),
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }


class Exchange:
    """A request being answered. `model` and `status` are what metrics are counted by."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.model = ""
        self.status = 0
        self._headers: list[Header] = scope["headers"]
        self._receive = receive
        self._send = send
        given = self.header(b"x-request-id")
        valid = given is not None and _REQUEST_ID.fullmatch(given)
        self.request_id = given if given and valid else b"req-" + uuid.uuid4().hex.encode()

    @property
    def started(self) -> bool:
        """Whether the status line is out."""
        return self.status != 0

    def header(self, name: bytes) -> bytes | None:
        """A header's value, by its lower-case name."""
        return next((value for key, value in self._headers if key == name), None)

    async def body(self, *, bytes_max: int, timeout_s: float) -> bytes:
        """The whole body. Raises BodyTooLarge (announced or not), BodyTimedOut or ClientGone."""
        announced = self.header(b"content-length")
        if announced is not None and int(announced) > bytes_max:
            raise self._too_large(bytes_max)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone("the client went away while sending its request")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > bytes_max:
                        raise self._too_large(bytes_max)
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise BodyTimedOut(f"the body did not arrive within {timeout_s:g} s") from None

    @staticmethod
    def _too_large(bytes_max: int) -> BodyTooLarge:
        return BodyTooLarge(f"the body is over the limit of {bytes_max} bytes")

    async def disconnected(self) -> None:
        """Return when the client has closed its connection; call once the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: tuple[Header, ...]) -> None:
        """Send the status and headers; the body follows with `write`."""
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"x-request-id", self.request_id)],
            }
        )

    async def write(self, body: bytes, *, last: bool = False) -> None:
        """Send a part of the body; waits while the client reads slowly."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})

    async def answer(
        self, status: int, body: bytes, *headers: Header, content_type: Header = JSON
    ) -> None:
        """Send a whole answer."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, (content_type, length, *headers))
        await self.write(body, last=True)

    async def fail(self, error: RequestFailed) -> None:
        """Answer an error with its status, and Retry-After where it has one."""
        headers: tuple[Header, ...] = ()
        if error.retry_after_s is not None:
            headers = ((b"retry-after", str(error.retry_after_s).encode()),)
        await self.answer(error.status, msgspec.json.encode(error_object(error)), *headers)


def check_text(body: bytes) -> None:
    """Raise BadRequest unless the body is valid UTF-8, wherever in it the fault is."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the body is not valid UTF-8 at byte {error.start}", code="invalid_utf8"
        ) from None
