"""A request as its sender sees it, and fail points at which a test looks on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.link.tokens import Finish
from engine.worker.errors import StageTimedOut
from engine.worker.failpoints import Action, FailPoint, FailPoints, Trigger
from engine.worker.order import Order
from tests.worker.conftest import Model


@dataclass
class Sent:
    """A request and what came back for it."""

    model: Model
    prompt: list[int]
    count: int
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    cancelled: bool = False

    @property
    def open(self) -> bool:
        return self.finish is None and not self.cancelled

    @property
    def right(self) -> bool:
        """Whether what came is what would have come anyway."""
        expected = self.model.expected(self.prompt, self.count)
        if self.finish is not Finish.LENGTH:
            expected = expected[: len(self.tokens)]
        return self.tokens == expected


class Points(FailPoints):
    """At most one fail point of one order, switched on; where it hangs the deadline has passed.

    `during` is called once copying has begun.
    """

    def __init__(
        self,
        point: FailPoint | None,
        action: Action,
        order: Order,
        during: Callable[[], None] = lambda: None,
    ) -> None:
        triggers = {point: Trigger(action)} if point is not None else {}
        if point is FailPoint.ROLLING_BACK:
            triggers[FailPoint.COPIED] = Trigger(Action.RAISE)
        super().__init__(triggers)
        self.reached: list[FailPoint] = []
        self._order = order
        self._during = during

    def reach(self, point: FailPoint, hang: Callable[[], object]) -> None:
        self.reached.append(point)
        if point is FailPoint.COPYING:
            self._during()

        def overrun() -> None:
            self._order.interrupt(StageTimedOut(f"{point} took too long"))
            hang()

        super().reach(point, overrun)
