"""The watch's promises: ordered, without gaps, resumable, bounded, and fair to others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from google.longrunning import operations_proto_pb2 as longrunning
from hotbay.v1 import model_pb2, node_pb2, partition_pb2, watch_pb2

from daemon.control.config import Limits
from daemon.control.errors import Refused
from daemon.control.services import watch as watch_module
from daemon.control.services.watch import Hub

PRESENT = watch_pb2.EVENT_TYPE_PRESENT
SYNCED = watch_pb2.EVENT_TYPE_SYNCED
CHANGED = watch_pb2.EVENT_TYPE_CHANGED
REMOVED = watch_pb2.EVENT_TYPE_REMOVED


class Scene:
    """A world of a few resources, to be changed by hand."""

    def __init__(self, **limits: int) -> None:
        self.resources: dict[str, dict[str, Any]] = {
            "partition": {"gpu0": partition_pb2.Partition(id="gpu0")},
            "model": {},
        }
        self.hub = Hub(self.snapshot, Limits(**limits))  # type: ignore[arg-type]

    def snapshot(self, kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
        return {kind: self.resources.get(kind, {}) for kind in kinds}

    def model(self, name: str, directory: str = "/") -> None:
        version = model_pb2.ModelVersion(version=1, key=f"{name}@1", directory=directory)
        self.resources["model"][name] = model_pb2.Model(name=name, versions=[version])
        self.hub.refresh()

    def watch(self, token: str = "", *kinds: str) -> Any:
        return self.hub.watch(token, kinds)


async def take(stream: Any, count: int) -> list[watch_pb2.WatchEvent]:
    async with asyncio.timeout(120):
        return [await anext(stream) for _ in range(count)]


def test_snapshot_then_synced_then_changes_in_order() -> None:
    async def scenario() -> None:
        scene = Scene()
        scene.model("a")
        stream = scene.watch()
        events = await take(stream, 3)
        assert [each.type for each in events] == [PRESENT, PRESENT, SYNCED]
        assert {(each.kind, each.name) for each in events[:2]} == {
            ("partition", "gpu0"),
            ("model", "a"),
        }
        for number in range(5):
            scene.model("a", f"/{number}")
        del scene.resources["model"]["a"]
        scene.hub.refresh()
        events = await take(stream, 6)
        assert [each.type for each in events] == [CHANGED] * 5 + [REMOVED]
        assert [each.model.versions[0].directory for each in events[:5]] == [
            f"/{number}" for number in range(5)
        ]
        revisions = [each.revision for each in events]
        assert revisions == list(range(revisions[0], revisions[0] + 6))

    asyncio.run(scenario())


def test_what_moves_all_the_time_is_no_event() -> None:
    async def scenario() -> None:
        scene = Scene()
        partition = scene.resources["partition"]["gpu0"]
        partition.models.add(model="a@1")
        stream = scene.watch()
        await take(stream, 2)
        partition.memory_free_bytes = 77
        partition.models[0].generation_tokens_total = 1000
        scene.hub.refresh()
        partition.models[0].state = model_pb2.ModelVersion(state=4).state
        scene.hub.refresh()
        (event,) = await take(stream, 1)
        assert event.partition.models[0].state == 4
        assert event.partition.memory_free_bytes == 77

    asyncio.run(scenario())


def test_resuming_at_every_token_misses_and_repeats_nothing() -> None:
    async def scenario() -> None:
        scene = Scene()
        stream = scene.watch()
        synced = (await take(stream, 2))[-1]
        for number in range(10):
            scene.model(f"m{number}")
        events = await take(stream, 10)
        for index, event in enumerate([synced, *events]):
            again = await take(scene.watch(event.resume_token), 10 - index) if index < 10 else []
            assert [each.revision for each in again] == [each.revision for each in events[index:]]

    asyncio.run(scenario())


@pytest.mark.parametrize("token", ["nonsense", "0000:1", "{epoch}:999", "{epoch}:1", "{epoch}:x"])
def test_tokens_that_cannot_be_resumed_are_refused(token: str) -> None:
    async def scenario() -> None:
        scene = Scene(watch_events_max=100)
        for number in range(150):
            scene.model("a", f"/{number}")
        with pytest.raises(Refused) as refused:
            await anext(scene.watch(token.format(epoch=scene.hub._epoch)))
        assert refused.value.reason == "RESUME_TOKEN_EXPIRED"
        assert scene.hub.watchers == 0

    asyncio.run(scenario())


def test_slow_watcher_is_ended_with_its_token_and_slows_nobody() -> None:
    async def scenario() -> None:
        scene = Scene(watcher_events_max=16)
        slow, quick = scene.watch(), scene.watch()
        await take(slow, 2)
        await take(quick, 2)
        seen = []
        for number in range(40):
            scene.model("a", f"/{number}")
            seen += await take(quick, 1)
        with pytest.raises(Refused) as refused:
            await take(slow, 1)
        assert refused.value.reason == "SLOW_CONSUMER"
        token = refused.value.metadata["resume_token"]
        rest = await take(scene.watch(token), 40)
        assert [each.revision for each in rest] == [each.revision for each in seen]

    asyncio.run(scenario())


def test_kinds_are_filtered_and_checked() -> None:
    async def scenario() -> None:
        scene = Scene()
        stream = scene.watch("", "model")
        (synced,) = await take(stream, 1)
        assert synced.type == SYNCED
        scene.resources["partition"]["gpu0"].worker_pid = 7
        scene.model("a")
        (event,) = await take(stream, 1)
        assert event.kind == "model"
        with pytest.raises(Refused, match="known are model"):
            await anext(scene.watch("", "models"))

    asyncio.run(scenario())


def test_bookmarks_keep_the_token_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch_module.BOOKMARK_INTERVAL_S <= 10
    monkeypatch.setattr(watch_module, "BOOKMARK_INTERVAL_S", 0.01)

    async def scenario() -> None:
        scene = Scene()
        stream = scene.watch("", "gpu")
        await take(stream, 1)
        scene.model("a")  # not of interest, but it moves the revision on
        bookmark = (await take(stream, 1))[0]
        assert bookmark.type == watch_pb2.EVENT_TYPE_BOOKMARK
        scene.resources["gpu"] = {"g": node_pb2.Gpu(uuid="g", health="ok")}
        scene.hub.refresh()
        resumed = await take(scene.watch(bookmark.resume_token, "gpu"), 1)
        assert resumed[0].gpu.uuid == "g"

    asyncio.run(scenario())


def test_watchers_are_bounded_and_ended_by_closing() -> None:
    async def scenario() -> None:
        scene = Scene(watchers_max=1)
        stream = scene.watch()
        await take(stream, 2)
        with pytest.raises(Refused, match="watchers_max"):
            await anext(scene.watch())
        pending = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        scene.hub.close()
        with pytest.raises(Refused) as refused:
            await pending
        assert refused.value.reason == "DAEMON_DRAINING"
        assert scene.hub.watchers == 0

    asyncio.run(scenario())


def test_a_burst_of_changes_costs_one_comparison() -> None:
    async def scenario() -> None:
        scene = Scene()
        stream = scene.watch("", "model")
        await take(stream, 1)
        for number in range(100):
            version = model_pb2.ModelVersion(version=1, key="a@1", directory=f"/{number}")
            scene.resources["model"]["a"] = model_pb2.Model(name="a", versions=[version])
            scene.hub.refresh_soon()
        (event,) = await take(stream, 1)
        assert event.model.versions[0].directory == "/99"
        assert scene.hub._revision == 2  # the partition, known since the stream began, and this

    asyncio.run(scenario())


def test_operations_tell_their_own_changes_and_their_end() -> None:
    async def scenario() -> None:
        scene = Scene()
        stream = scene.watch("", "operation")
        await take(stream, 1)
        operation = longrunning.Operation(name="operations/1")
        scene.hub.changed("operation", operation.name, operation)
        scene.hub.refresh()
        scene.hub.removed("operation", operation.name)
        events = await take(stream, 2)
        assert [each.type for each in events] == [CHANGED, REMOVED]
        assert events[0].operation.name == events[1].name == "operations/1"

    asyncio.run(scenario())
