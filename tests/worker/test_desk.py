"""The desk: credit, frames, and which requests may still be handed back."""

from __future__ import annotations

from engine.link.tokens import STEP_FRAMES_CREDIT, Finish, Output, Step
from engine.worker import desk as desk_module
from engine.worker.desk import Desk


class Line:
    """Both directions of a desk's link."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, Step]] = []
        self.dropped: list[int] = []
        self.desk = Desk(lambda link, step: self.frames.append((link, step)), self.dropped.append)
        self.desk.opened(1)

    @property
    def outputs(self) -> list[Output]:
        return [output for _, step in self.frames for output in step.outputs]


def test_one_steps_outputs_travel_in_one_frame() -> None:
    line = Line()
    for number in (1, 2, 3):
        assert line.desk.enter(number, "m")
    line.desk.deliver([Output(number, (number,)) for number in (1, 2, 3)])
    assert [len(step.outputs) for _, step in line.frames] == [3]
    assert [line.desk.told(number) for number in (1, 2, 3, 4)] == [True, True, True, False]


def test_a_number_in_use_is_not_taken_twice() -> None:
    line = Line()
    assert line.desk.enter(1, "m")
    assert not line.desk.enter(1, "m")
    line.desk.deliver([Output(1, (5,), finish=Finish.STOP)])
    assert line.desk.enter(1, "m")


def test_without_credit_nothing_is_sent_until_it_is_granted() -> None:
    line = Line()
    line.desk.enter(1, "m")
    for token in range(STEP_FRAMES_CREDIT):
        assert line.desk.open
        line.desk.deliver([Output(1, (token,))])
    assert not line.desk.open
    line.desk.end(1, Finish.ABORT)
    line.desk.flush()
    assert len(line.frames) == STEP_FRAMES_CREDIT
    line.desk.grant(1)
    assert line.outputs[-1] == Output(1, finish=Finish.ABORT)
    assert not line.desk.open
    line.desk.grant(10**9)
    line.desk.enter(2, "m")
    for token in range(STEP_FRAMES_CREDIT):
        line.desk.deliver([Output(2, (token,))])
    assert not line.desk.open, "credit never exceeds its limit, whatever is granted"


def test_what_had_a_token_sent_is_never_handed_back() -> None:
    line = Line()
    for number in (1, 2):
        line.desk.enter(number, "m")
    line.desk.deliver([Output(1, (7,))])
    assert line.desk.end(1, Finish.REQUEUE, "unloaded") is True
    assert line.desk.end(2, Finish.REQUEUE) is False
    line.desk.flush()
    assert line.outputs[-2:] == [
        Output(1, finish=Finish.ERROR, error="unloaded"),
        Output(2, finish=Finish.REQUEUE),
    ]


def test_outputs_of_a_request_that_has_ended_are_left_out() -> None:
    line = Line()
    line.desk.enter(1, "m")
    line.desk.leave(1)
    line.desk.deliver([Output(1, (7,)), Output(99, (7,))])
    assert line.frames == []
    assert line.desk.of_model("m") == []


def test_a_lost_link_forgets_everything_and_the_next_starts_with_full_credit() -> None:
    line = Line()
    for number, model in ((1, "a"), (2, "b"), (3, "a")):
        line.desk.enter(number, model)
    line.desk.end(2, Finish.REQUEUE)
    assert line.desk.closed() == {"a": [1, 3]}
    assert not line.desk.open
    line.desk.flush()
    assert line.frames == []
    line.desk.opened(2)
    line.desk.enter(1, "a")
    line.desk.deliver([Output(1, (3,))])
    assert line.frames == [(2, Step((Output(1, (3,)),)))]


def test_a_gateway_that_never_grants_is_dropped() -> None:
    line = Line()
    line.desk.enter(1, "m")
    for token in range(STEP_FRAMES_CREDIT):
        line.desk.deliver([Output(1, (token,))])
    for number in range(2, desk_module.OUTPUTS_WAITING_MAX + 3):
        line.desk.enter(number, "m")
        line.desk.end(number, Finish.REQUEUE)
    assert line.dropped == []
    line.desk.flush()
    assert line.dropped == [1]
