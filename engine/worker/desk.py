"""The requests that came over the token link, and the frames that go back over it.

Owns which request is whose and whether a token of it was sent, and the credit of Step frames. It
never touches an engine. There is one token link at a time, so that the gateway's numbers name the
requests everywhere. Invariants: after a request's finish nothing more is sent for it; nothing is
sent without credit; what may still be answered with REQUEUE has had no token sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.link.tokens import STEP_FRAMES_CREDIT, Finish, Output, Step

OUTPUTS_WAITING_MAX = 65536
"""Outputs kept for want of credit; a gateway that lets more pile up is broken and dropped."""


@dataclass(slots=True)
class _Request:
    model: str
    told: bool = False


class Desk:
    """Requests by number. Of the step thread alone.

    `send(link, step)` hands a frame to the link of that number; `drop(link)` gives the link up.
    """

    def __init__(self, send: Callable[[int, Step], None], drop: Callable[[int], None]) -> None:
        self._send = send
        self._drop = drop
        self._link = 0
        self._credit = 0
        self._requests: dict[int, _Request] = {}
        self._waiting: list[Output] = []

    @property
    def open(self) -> bool:
        """Whether a frame may be sent now; without it there is no point in stepping."""
        return self._credit > 0

    def opened(self, link: int) -> None:
        """A new link; the one before was closed."""
        self._link, self._credit = link, STEP_FRAMES_CREDIT

    def closed(self) -> dict[str, list[int]]:
        """The link is gone: forget every request and return them by model."""
        gone: dict[str, list[int]] = {}
        for number, request in self._requests.items():
            gone.setdefault(request.model, []).append(number)
        self._requests.clear()
        self._waiting.clear()
        self._link = self._credit = 0
        return gone

    def grant(self, frames: int) -> None:
        """The gateway took frames off the link."""
        self._credit = min(self._credit + max(frames, 0), STEP_FRAMES_CREDIT)
        self.flush()

    def enter(self, number: int, model: str) -> bool:
        """Note a request for `model`; False when the number is in use already."""
        if number in self._requests:
            return False
        self._requests[number] = _Request(model)
        return True

    def refuse(self) -> None:
        """Give the link up: the gateway broke its rules."""
        self._drop(self._link)

    def model_of(self, number: int) -> str | None:
        """The model a request is for; None once it has ended."""
        request = self._requests.get(number)
        return request.model if request else None

    def leave(self, number: int) -> None:
        """Forget a request without answering it."""
        self._requests.pop(number, None)

    def of_model(self, model: str) -> list[int]:
        """The open requests of a model, oldest first."""
        return [number for number, request in self._requests.items() if request.model == model]

    def told(self, number: int) -> bool:
        """Whether a token of this request was sent."""
        request = self._requests.get(number)
        return request is not None and request.told

    def end(self, number: int, finish: Finish, error: str = "") -> bool:
        """Answer a request without a token. Returns whether it was lost to the client.

        REQUEUE is turned into an error where a token was sent: it cannot be run again elsewhere.
        """
        told = self.told(number)
        if finish is Finish.REQUEUE and told:
            finish, error = Finish.ERROR, error or "the model was unloaded"
        if number in self._requests:
            self.leave(number)
            self._waiting.append(Output(request=number, finish=finish, error=error))
        return finish is not Finish.REQUEUE

    def deliver(self, outputs: Iterable[Output]) -> None:
        """Send one step's outputs in one frame, leaving out requests that have ended."""
        for output in outputs:
            request = self._requests.get(output.request)
            if request is None:
                continue
            if output.finish is not None:
                del self._requests[output.request]
            elif output.tokens:
                request.told = True
            self._waiting.append(output)
        self.flush()

    def flush(self) -> None:
        """Send what waits, if there is credit."""
        if len(self._waiting) > OUTPUTS_WAITING_MAX:
            self.refuse()
        elif self._waiting and self._credit > 0:
            self._credit -= 1
            outputs, self._waiting = tuple(self._waiting), []
            self._send(self._link, Step(outputs))
