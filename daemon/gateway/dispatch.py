"""The dispatcher: brings each stream to the worker of its route, or holds it until there is one.

It owns the table, the hold queue and the set of unfinished streams, and moves streams between their
phases; it never reads a client's request or writes an answer. Invariant: every stream it opened
ends exactly once, by an output with a finish, by a failure in its mailbox, or by `cancel`; and one
of which a token has arrived is never sent to a worker again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

from daemon.gateway.errors import (
    EngineFailed,
    NotFound,
    RequestFailed,
    Unavailable,
    WorkerLost,
)
from daemon.gateway.hold import HoldQueue
from daemon.gateway.metrics import GatewayMetrics
from daemon.gateway.streams import Mailbox, Phase, Stream
from daemon.gateway.table import Table
from daemon.gateway.unfinished import Unfinished
from daemon.gateway.workers import Workers
from engine.link.routes import Disposition, Route
from engine.link.tokens import Finish, Output, Sampling

REQUEUE_RETRY_S = 0.1
"""How long a model whose worker sent a stream back is left alone, unless a table comes first."""
RETRY_AFTER_S = 5


class Dispatcher:
    """`on_change` is called whenever demand, the table or a link may have changed."""

    def __init__(self, metrics: GatewayMetrics, on_change: Callable[[], None]) -> None:
        self.table = Table()
        self.draining = False
        self.workers = Workers(self)
        self.unfinished = Unfinished()
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._on_change = on_change
        self._held = HoldQueue(self.table.limits.held_requests_max)
        self._retries: dict[str, asyncio.TimerHandle] = {}
        self._serials = itertools.count(1)

    # What handlers call.

    def open(
        self,
        route: Route,
        prompt: tuple[int, ...],
        sampling: Sampling,
        *,
        priority: int,
        cache_salt: str,
        index: int,
        mailbox: Mailbox,
        arrived_s: float,
    ) -> Stream:
        """Take a stream on and send or hold it. Raises Unavailable when neither is possible."""
        current = self.table.by_key.get(route.model)
        if self.draining:
            raise Unavailable("the gateway is shutting down", code="draining", retry_after_s=1)
        if current is None or current.disposition is Disposition.REFUSE:
            raise self._refusal(route.model, current)
        stream = Stream(
            serial=next(self._serials),
            index=index,
            model=route.model,
            prompt=prompt,
            sampling=sampling,
            priority=priority,
            cache_salt=cache_salt,
            mailbox=mailbox,
            arrived_s=arrived_s,
        )
        if self._held.holds(stream.model) or not self._send(stream):
            if self._held.full:
                raise Unavailable(
                    f"{len(self._held)} requests are waiting for their models already, "
                    "which is as many as this gateway holds",
                    code="hold_queue_full",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._hold(stream)
        self.unfinished.add(stream)
        if not self.table.serves(stream.model):
            self._on_change()
        return stream

    def cancel(self, stream: Stream) -> None:
        """Forget a stream wherever it is; the worker frees its KV. Idempotent."""
        if stream.phase is Phase.FINISHED:
            return
        if stream.link is not None:
            stream.link.cancel(stream)
        self._end(stream)

    # What hotbayd's link calls.

    def set_table(self, table: Table) -> None:
        """Put a table in force: links, limits, and what is held."""
        self.table = table
        self.unfinished.table_changed(table)
        self._held.requests_max = table.limits.held_requests_max
        self.workers.set_addresses(table.workers.values())
        for model in list(self._retries):
            self._cancel_retry(model)
        for model in self._held.models():
            self._release(model)
        self._on_change()

    @property
    def held(self) -> int:
        return len(self._held)

    def fail_all(self, error: RequestFailed) -> None:
        """End every stream with this error."""
        for stream in self.unfinished:
            if stream.link is not None:
                stream.link.cancel(stream)
            self._fail(stream, error)

    # What the token links call.

    def on_connected(self, partition: str) -> None:
        for model in self._held.models():
            route = self.table.by_key.get(model)
            if route is not None and route.partition == partition:
                self._cancel_retry(model)
                self._release(model)
        self._on_change()

    def on_output(self, stream: Stream, output: Output) -> None:
        finish = output.finish
        if output.tokens:
            self._count(stream, output)
        if finish is None:
            stream.phase = Phase.STREAMING
            stream.mailbox.put(stream.index, output)
        elif finish is Finish.REQUEUE:
            self._send_back(stream, "the worker sent it back after it had begun to answer")
            if self.table.serves(stream.model):
                self._retry_later(stream.model)
        elif finish is Finish.ERROR:
            self._fail(stream, EngineFailed(output.error or "the engine failed"))
        elif finish is Finish.ABORT:
            reason = output.error or f"{stream.model} was taken off its partition"
            self._fail(stream, Unavailable(reason, code="aborted", retry_after_s=RETRY_AFTER_S))
        else:
            stream.mailbox.put(stream.index, output)
            self._end(stream)

    def on_broken(self, partition: str, streams: list[Stream], reason: str) -> None:
        for stream in streams:
            self._send_back(stream, f"the worker of partition {partition} ended: {reason}")
        # A worker that came back at once is tried at once, in the order of arrival.
        for model in {stream.model for stream in streams}:
            self._release(model)
        self._on_change()

    def _count(self, stream: Stream, output: Output) -> None:
        now_s, metrics = time.monotonic(), self._metrics
        if stream.last_output_s:
            metrics.inter_token_seconds.observe(now_s - stream.last_output_s)
        else:
            metrics.first_token_seconds.observe(now_s - stream.arrived_s)
        stream.last_output_s = now_s
        metrics.generation_tokens[stream.model] += len(output.tokens)

    # Moving streams.

    def _send(self, stream: Stream) -> bool:
        route = self.table.by_key.get(stream.model)
        if route is None or route.disposition is not Disposition.SERVE:
            return False
        if stream.model in self._retries or not self.workers.submit(route.partition, stream):
            return False
        stream.phase = Phase.SENT
        return True

    def _hold(self, stream: Stream) -> None:
        timeout_s = self.table.limits.hold_timeout_s
        stream.phase, stream.link = Phase.HELD, None
        stream.held_since_s = time.monotonic()
        stream.hold_timer = self._loop.call_later(timeout_s, self._expire, stream, timeout_s)
        self._held.add(stream)

    def _unhold(self, stream: Stream) -> None:
        if stream.hold_timer is not None:
            stream.hold_timer.cancel()
            stream.hold_timer = None
        self._held.remove(stream)
        self._metrics.hold_seconds.observe(time.monotonic() - stream.held_since_s)

    def _release(self, model: str) -> None:
        """Send what is held of a model, as far as its route and its worker take it."""
        route = self.table.by_key.get(model)
        if route is None or route.disposition is Disposition.REFUSE:
            for stream in self._held.of(model):
                self._fail(stream, self._refusal(model, route))
            return
        for stream in self._held.of(model):
            if not self._send(stream):
                # Without a link, `on_connected` comes; with one, its queue is full for now.
                if self.table.serves(model) and self.workers.connected_to(route.partition):
                    self._retry_later(model)
                return
            self._unhold(stream)

    def _retry_later(self, model: str) -> None:
        if model not in self._retries:
            self._retries[model] = self._loop.call_later(REQUEUE_RETRY_S, self._retry, model)

    def _retry(self, model: str) -> None:
        self._retries.pop(model, None)
        self._release(model)

    def _cancel_retry(self, model: str) -> None:
        retry = self._retries.pop(model, None)
        if retry is not None:
            retry.cancel()

    def _send_back(self, stream: Stream, reason: str) -> None:
        if stream.phase is not Phase.SENT:
            self._fail(stream, WorkerLost(f"{reason}; send the request again"))
            return
        self._hold(stream)
        self._on_change()

    def _expire(self, stream: Stream, timeout_s: float) -> None:
        route = self.table.by_key.get(stream.model)
        state = route.state if route is not None else "unregistered"
        self._fail(
            stream,
            Unavailable(
                f"{stream.model} was not brought up within {timeout_s:g} s (it is {state})",
                code="hold_timeout",
                retry_after_s=RETRY_AFTER_S,
            ),
        )

    def _refusal(self, model: str, route: Route | None) -> RequestFailed:
        if route is None:
            return NotFound(f"the model {model} was removed", param="model", code="model_not_found")
        reason = route.reason or f"it is {route.state}"
        return Unavailable(
            f"{model} cannot be served: {reason}", param="model", retry_after_s=RETRY_AFTER_S
        )

    def _fail(self, stream: Stream, error: RequestFailed) -> None:
        stream.mailbox.put(stream.index, error)
        self._end(stream)

    def _end(self, stream: Stream) -> None:
        if stream.phase is Phase.HELD:
            self._unhold(stream)
        stream.phase, stream.link = Phase.FINISHED, None
        self.unfinished.remove(stream)
        if not self.table.serves(stream.model):
            self._on_change()
