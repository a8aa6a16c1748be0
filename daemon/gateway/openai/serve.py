"""The two completion endpoints: from a request's body to the last byte of its answer.

A handler opens one stream for each sequence, reads their mailbox, and writes; it cancels whatever
is unfinished when it ends, for any reason, so that a client's disconnect, an error or a deadline
frees the worker's memory at once. Nothing is sent before the first output, so that an early failure
still gets its own status; a later one ends the stream with an error event and no [DONE].
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from daemon.gateway.config import GatewayConfig
from daemon.gateway.dispatch import Dispatcher
from daemon.gateway.errors import ClientGone, DeadlinePassed, RequestFailed, Unavailable
from daemon.gateway.metrics import GatewayMetrics
from daemon.gateway.openai.chunks import DONE, event
from daemon.gateway.openai.fields import BodyDecoder, CommonFields
from daemon.gateway.openai.jobs import Job, chat_job, completion_job
from daemon.gateway.openai.logprobs import Entry
from daemon.gateway.streams import Mailbox, Stream
from daemon.gateway.tokens.tokenizer import ModelTokenizer, TokenizerCache
from daemon.gateway.web.exchange import Exchange, error_object
from daemon.gateway.web.pages import model_unknown
from engine.link.routes import Route
from engine.link.tokens import Output

EVENT_STREAM = ((b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"))
LAST_WRITE_TIMEOUT_S = 1.0
"""How long a client is given to take the event that breaks its stream off."""


@dataclass
class Run:
    """A job on its way."""

    job: Job
    exchange: Exchange
    arrived_s: float
    mailbox: Mailbox
    streams: list[Stream] = field(default_factory=list)


class Completions:
    """Handlers of /v1/chat/completions and /v1/completions. `idle` is set while none runs."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizers: TokenizerCache,
        metrics: GatewayMetrics,
        config: GatewayConfig,
    ) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._running = 0
        self._dispatcher = dispatcher
        self._tokenizers = tokenizers
        self._metrics = metrics
        self._config = config
        self._decoder = BodyDecoder()

    async def chat(self, exchange: Exchange) -> None:
        """POST /v1/chat/completions."""

        async def make(body: bytes) -> Job:
            fields = self._decoder.chat(body)
            route, tokenizer = await self._model(exchange, fields)
            authorization = exchange.header(b"authorization")
            return await chat_job(fields, route, tokenizer, self._config, authorization)

        await self._handle(exchange, make)

    async def completions(self, exchange: Exchange) -> None:
        """POST /v1/completions."""

        async def make(body: bytes) -> Job:
            fields = self._decoder.completion(body)
            route, tokenizer = await self._model(exchange, fields)
            authorization = exchange.header(b"authorization")
            return await completion_job(fields, route, tokenizer, self._config, authorization)

        await self._handle(exchange, make)

    async def _handle(self, exchange: Exchange, make: Callable[[bytes], Awaitable[Job]]) -> None:
        arrived_s = time.monotonic()
        if self._dispatcher.draining:
            raise Unavailable("the gateway is shutting down", code="draining", retry_after_s=1)
        if self._running >= self._config.open_requests_max:
            raise Unavailable(
                f"{self._running} requests are open already, which is as many as this gateway "
                "takes",
                code="too_many_requests",
                retry_after_s=1,
            )
        self._running += 1
        self.idle.clear()
        try:
            body = await exchange.body(
                bytes_max=self._config.body_bytes_max, timeout_s=self._config.body_timeout_s
            )
            job = await make(body)
            # Whole answers need no waking in between, but for stop strings that end them early.
            mailbox = Mailbox(eager=job.stream or job.stops)
            await self._run(Run(job, exchange, arrived_s, mailbox))
        finally:
            self._running -= 1
            if not self._running:
                self.idle.set()

    async def _model(
        self, exchange: Exchange, fields: CommonFields
    ) -> tuple[Route, ModelTokenizer]:
        table = self._dispatcher.table
        if not table.received:
            raise Unavailable(
                "the gateway has just started and does not know its models yet",
                code="starting",
                retry_after_s=1,
            )
        route = table.resolve(fields.model)
        if route is None:
            raise model_unknown(fields.model)
        exchange.model = route.model
        return route, await self._tokenizers.get(route)

    async def _run(self, run: Run) -> None:
        job, timeout_s = run.job, self._config.request_timeout_s
        watcher = asyncio.create_task(_watch(run))
        try:
            async with asyncio.timeout(timeout_s):
                self._open(run)
                await (self._stream(run) if job.stream else self._whole(run))
        except TimeoutError:
            error = DeadlinePassed(f"the request took longer than {timeout_s:g} s")
            await _break_off(run.exchange, error)
        except RequestFailed as error:
            await _break_off(run.exchange, error)
        finally:
            watcher.cancel()
            for stream in run.streams:
                self._dispatcher.cancel(stream)

    def _open(self, run: Run) -> None:
        job = run.job
        for index, (prompt, sampling) in enumerate(job.sequences):
            stream = self._dispatcher.open(
                job.route,
                prompt,
                sampling,
                priority=job.priority,
                cache_salt=job.cache_salt,
                index=index,
                mailbox=run.mailbox,
                arrived_s=run.arrived_s,
            )
            run.streams.append(stream)
        self._metrics.prompt_tokens[job.model] += job.usage().prompt_tokens

    async def _whole(self, run: Run) -> None:
        """Collect everything, then answer."""
        choices = run.job.choices
        texts: list[list[str]] = [[] for _ in choices]
        entries: list[list[Entry]] = [[] for _ in choices]
        unfinished = len(choices)
        while unfinished:
            for index, happened in await run.mailbox.take():
                text = self._advance(run, index, happened)
                if text is not None:
                    texts[index].append(text)
                    entries[index] += choices[index].entries
                    unfinished -= choices[index].finish is not None
        for choice, collected in zip(choices, entries, strict=True):
            choice.entries = collected
        answers = [(choice, "".join(texts[choice.index])) for choice in choices]
        await run.exchange.answer(200, run.job.style.whole(answers, run.job.usage()))

    async def _stream(self, run: Run) -> None:
        """Write what each step brings, all of one wake-up at once."""
        unfinished = len(run.job.choices)
        while unfinished:
            parts: list[bytes] = []
            failure: RequestFailed | None = None
            for index, happened in await run.mailbox.take():
                try:
                    parts += self._events(run, index, happened)
                except RequestFailed as error:
                    failure = error
                    break
                if run.job.choices[index].finish is not None and parts:
                    unfinished = sum(choice.finish is None for choice in run.job.choices)
            if not unfinished:
                if run.job.include_usage:
                    parts.append(run.job.style.usage(run.job.usage()))
                parts.append(DONE)
            body = b"".join(parts)
            if body:
                if not run.exchange.started:
                    await run.exchange.start(200, EVENT_STREAM)
                await run.exchange.write(body, last=not unfinished)
            if failure is not None:
                raise failure

    def _events(self, run: Run, index: int, happened: Output | RequestFailed) -> list[bytes]:
        choice, style = run.job.choices[index], run.job.style
        opening = not choice.begun
        text = self._advance(run, index, happened)
        if text is None:
            return []
        events = [style.delta(choice, text)]
        if opening:
            events.insert(0, style.opening(choice))
        if choice.finish is not None:
            events.append(style.closing(choice))
        return events

    def _advance(self, run: Run, index: int, happened: Output | RequestFailed) -> str | None:
        """Move a choice on; its new text, or None when it had ended. Raises what went wrong."""
        if isinstance(happened, RequestFailed):
            raise happened
        choice = run.job.choices[index]
        if choice.finish is not None:
            return None
        text = choice.advance(happened)
        if choice.finish is not None and happened.finish is None:
            # A stop string matched, of which the worker knows nothing.
            self._dispatcher.cancel(run.streams[index])
        return text


async def _watch(run: Run) -> None:
    """Tell the handler when its client has gone."""
    await run.exchange.disconnected()
    run.mailbox.put(0, ClientGone("the client closed its connection"))


async def _break_off(exchange: Exchange, error: RequestFailed) -> None:
    """End an answer with an error: an event where it has begun, else a status."""
    if isinstance(error, ClientGone) or not exchange.started:
        raise error
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WRITE_TIMEOUT_S):
            await exchange.write(event(error_object(error)), last=True)
