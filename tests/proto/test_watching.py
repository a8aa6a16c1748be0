"""Watching through broken streams: nothing missed, nothing twice, and an honest new beginning."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hotbay import errors
from hotbay.client import Client
from hotbay.reasons import Reason
from hotbay.v1 import watch_pb2

from tests.support.clocks import ManualClock
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import Refusal


def event(
    revision: int, type_: watch_pb2.EventType.ValueType = watch_pb2.EVENT_TYPE_CHANGED
) -> watch_pb2.WatchEvent:
    return watch_pb2.WatchEvent(
        type=type_, revision=revision, resume_token=f"t{revision}", kind="model", name="prose"
    )


AWAY = Refusal(Reason.DAEMON_DRAINING, "stopping")


def tokens_asked_with(node: ScriptedNode) -> list[str]:
    return [one.resume_token for one in node.requests if isinstance(one, watch_pb2.WatchRequest)]


def revisions(client: Client, count: int, token: str = "") -> list[int]:
    stream = client.watch(resume_token=token)
    found = [one.revision for one in islice(stream, count)]
    stream.close()  # type: ignore[attr-defined]
    return found


def test_a_broken_stream_goes_on_where_it_broke(node: ScriptedNode, client: Client) -> None:
    node.watches = [[event(1), event(2), AWAY], [AWAY], [event(3), event(4)]]
    assert revisions(client, 4) == [1, 2, 3, 4]
    assert tokens_asked_with(node) == ["", "t2", "t2"]


def test_a_stream_that_merely_ends_is_taken_up_again(node: ScriptedNode, client: Client) -> None:
    node.watches = [[event(1)], [event(2)]]
    stream = client.watch()
    assert next(stream).revision == 1
    node.stop()
    node.start()
    assert next(stream).revision == 2
    assert tokens_asked_with(node) == ["", "t1"]


def test_bookmarks_move_the_token_and_stay_inside(node: ScriptedNode, client: Client) -> None:
    bookmark = event(9, watch_pb2.EVENT_TYPE_BOOKMARK)
    node.watches = [[event(1), bookmark, AWAY], [event(10)]]
    assert revisions(client, 2) == [1, 10]
    assert tokens_asked_with(node) == ["", "t9"]


def test_a_token_no_longer_kept_begins_anew(node: ScriptedNode, client: Client) -> None:
    expired = Refusal(Reason.RESUME_TOKEN_EXPIRED, "too old")
    node.watches = [[expired], [event(0, watch_pb2.EVENT_TYPE_PRESENT), event(1)]]
    assert revisions(client, 2, token="old") == [0, 1]
    assert tokens_asked_with(node) == ["old", ""]


def test_a_slow_watcher_resumes_from_the_token_it_is_given(
    node: ScriptedNode, client: Client
) -> None:
    slow = Refusal(Reason.SLOW_CONSUMER, "too slow", {"resume_token": "t7"})
    node.watches = [[event(5), slow], [event(8)]]
    assert revisions(client, 2) == [5, 8]
    assert tokens_asked_with(node) == ["", "t7"]


def test_kinds_are_passed_on_and_a_refusal_is_final(node: ScriptedNode, client: Client) -> None:
    node.watches = [[Refusal(Reason.INVALID_ARGUMENT, "no kind 'x'")]]
    with pytest.raises(errors.InvalidArgument, match="no kind 'x'"):
        next(client.watch(["x"]))
    assert node.last(watch_pb2.WatchRequest).kinds == ["x"]
    assert len(tokens_asked_with(node)) == 1


def test_nobody_to_watch(tmp_path: Path) -> None:
    with Client(f"unix:{tmp_path}/none.sock") as client, pytest.raises(errors.Unreachable):
        next(client.watch())


def test_a_stream_that_ends_every_time_is_asked_for_at_a_bounded_pace(node: ScriptedNode) -> None:
    clock = ManualClock()
    node.watches = [[event(1)]]
    node.endless_watches = False
    with Client(node.endpoint, reconnect_s=5, clock=clock) as client:
        stream = client.watch()
        assert next(stream).revision == 1
        with pytest.raises(errors.Unavailable, match="ended the watch"):
            next(stream)
    assert len(tokens_asked_with(node)) == len(clock.pauses) + 1 == 10
