"""Which requests of an engine are open, and what is to be said of them next.

Owns the requests from submission to their last token, the outputs that are yet to be returned, and
what a draw does to its request: it takes its place among the tokens, or ends it. It never plans and
never computes. Invariants: a request is answered with exactly one finish, unless it is dropped; of
what was drawn for one that had ended by then nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.link.tokens import Finish, Output
from engine.request import Request
from engine.sampler import Draw
from engine.scheduler import Scheduler


class Answers:
    """The open requests of one engine, planned by `scheduler`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.generation_tokens = 0
        """Drawn and sent."""
        self.discarded_tokens = 0
        """Drawn for requests that had ended by then."""
        self._scheduler = scheduler
        self._open: dict[int, Request] = {}
        self._ready: list[Output] = []

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._open.values())

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._open

    @property
    def ready(self) -> bool:
        """Whether anything is to be said."""
        return bool(self._ready)

    def add(self, request: Request) -> None:
        """A request waits for its turn from now on."""
        self._open[request.id] = request
        self._scheduler.add(request)

    def refuse(self, request_id: int, error: str) -> None:
        """What was never a request ends."""
        self._ready.append(Output(request_id, finish=Finish.ERROR, error=error))

    def drop(self, request_id: int) -> bool:
        """Forget a request and free its KV; nothing is said. False when there is none."""
        self._ready = [output for output in self._ready if output.request != request_id]
        request = self._open.pop(request_id, None)
        if request is not None:
            self._scheduler.remove(request)
        return request is not None

    def is_open(self, request: Request) -> bool:
        """Whether it has not ended, and was not dropped."""
        return self._open.get(request.id) is request

    def end_dropped(self, request: Request, error: str) -> None:
        """End with an error what the scheduler has dropped, if that did not end before."""
        if self.is_open(request):
            del self._open[request.id]
            self.refuse(request.id, error)

    def accept(self, request: Request, draw: Draw, place: int, gone: Sequence[Request]) -> None:
        """Put a draw in its place in the request, or end that; `gone` are those that the scheduler
        has dropped already."""
        if not self.is_open(request):
            self.discarded_tokens += 1
            return
        cached = request.cached_tokens if place == request.prompt_tokens else 0
        if draw.token is None:
            # Nobody is to go on from what led to this.
            self._scheduler.prefixes.forget(request)
            self._close(request, gone)
            self.refuse(request.id, "the model's output for it is not a number")
            return
        if draw.token in request.stop_token_ids:
            self._close(request, gone)
            self._ready.append(Output(request.id, finish=Finish.STOP, cached_tokens=cached))
            return
        # Behind it there may be one that is on its way already.
        request.tokens[place : place + 1] = [draw.token]
        self.generation_tokens += 1
        finish = None
        if place + 1 >= request.tokens_max:
            finish = Finish.LENGTH
            self._close(request, gone)
        logprobs = () if draw.logprob is None else (draw.logprob,)
        self._ready.append(
            Output(request.id, (draw.token,), logprobs, finish, cached_tokens=cached)
        )

    def take(self) -> list[Output]:
        """What is to be said, once."""
        outputs, self._ready = self._ready, []
        return outputs

    def _close(self, request: Request, gone: Sequence[Request]) -> None:
        del self._open[request.id]
        if request not in gone:
            self._scheduler.remove(request)
