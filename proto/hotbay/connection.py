"""One gRPC channel to hotbayd, and the one way calls go over it.

Every call has a deadline, and every failure becomes an error of `hotbay.errors`. The channel
connects when it is first used, and again by itself after the daemon was away. It never retries:
who may repeat what is for the callers to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from hotbay.endpoints import target_of
from hotbay.errors import HotbayError
from hotbay.status import call_error

Answer = TypeVar("Answer")

# A Node or a list page is a few KiB; this bounds what a wrong peer could make us hold.
MESSAGE_BYTES_MAX = 16 * 1024 * 1024
# What a list method is asked to answer with at once.
PAGE_SIZE = 200
OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # The control socket is local or named on purpose: a proxy of the environment is not asked.
    ("grpc.enable_http_proxy", 0),
    # Clients of one process must not wait out each other's pauses.
    ("grpc.use_local_subchannel_pool", 1),
    # A restarted daemon is back in about a second; gRPC's own pauses would grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


class Connection:
    """A channel to `endpoint`; safe to use from several threads."""

    def __init__(self, endpoint: str, *, timeout_s: float) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self.answered = False
        self._channel = grpc.insecure_channel(target_of(endpoint), options=OPTIONS)

    def close(self) -> None:
        """Give the channel back; calls under way are cancelled."""
        self._channel.close()

    def stub(self, kind: Callable[[Any], Answer]) -> Answer:
        """A generated stub on this channel."""
        return kind(self._channel)

    def call(
        self, method: Callable[..., Answer], request: object, timeout_s: float | None = None
    ) -> Answer:
        """Call a unary method. Raises an error of the tree, HotbayError, and nothing else."""
        try:
            answer = method(request, timeout=self.timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise self.error(error) from error
        self.answered = True
        return answer

    def pages(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """All pages of a list method. `request` is used up: its page fields are written."""
        request.page_size = PAGE_SIZE
        while True:
            page = self.call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def error(self, error: grpc.RpcError) -> HotbayError:
        """The client's error for a failed call."""
        return call_error(error, self.endpoint)
