"""Several loads share one disk: each has as much under way as any other, so all come on evenly."""

from __future__ import annotations

import threading
from collections import Counter, deque

import pytest

import swap.cached_image
from swap.cached_image import READ_THREADS, restore_image, save_image
from swap.checksum import BLOCK_BYTES
from swap.direct_file import DirectFile
from swap.image import segment_bytes
from swap.segment import Segment
from tests.swap.test_cached_image import bare

WAIT_S = 120.0


class QueueingDisk:
    """A disk that serves in the order of asking, once every load asks for all it would."""

    def __init__(self, requests: dict[str, int]) -> None:
        self.order: list[str] = []
        self.under_way_max: Counter[str] = Counter()
        self._left = dict(requests)
        self._waiting: deque[tuple[object, str]] = deque()
        self._turns = threading.Condition()

    def wait_for_turn(self, name: str) -> None:
        ticket = object()
        with self._turns:
            self._waiting.append((ticket, name))
            self.under_way_max |= Counter(waiting for _, waiting in self._waiting)
            self._turns.notify_all()
            assert self._turns.wait_for(lambda: self._may_go(ticket), WAIT_S), "nobody is served"
            self._waiting.popleft()
            self._left[name] -= 1
            self.order.append(name)
            self._turns.notify_all()

    def _may_go(self, ticket: object) -> bool:
        asked = sum(min(left, READ_THREADS) for left in self._left.values())
        return len(self._waiting) >= asked and self._waiting[0][0] is ticket


@pytest.mark.parametrize("blocks", [(8, 8), (24, 8)])
def test_loads_of_any_size_come_on_evenly(blocks, make_image, tmp_path, monkeypatch):
    """An image three times as large gets no more of the disk while the other is being read."""
    monkeypatch.setattr(swap.cached_image, "PIECE_BYTES", BLOCK_BYTES)
    images = []
    for index, count in enumerate(blocks):
        manifest, segment = make_image(index, (count * BLOCK_BYTES // 4,))
        path = tmp_path / f"{index}.image"
        save_image(segment, path)
        images.append((path, bare(manifest)))
    disk = QueueingDisk({path.name: count for (path, _), count in zip(images, blocks, strict=True)})
    fetch = DirectFile.fetch

    def fetch_in_turn(self, buffer, start, end):
        disk.wait_for_turn(self.path.name)
        return fetch(self, buffer, start, end)

    monkeypatch.setattr(DirectFile, "fetch", fetch_in_turn)
    sealed = []

    def load(path, layout):
        with Segment.create(segment_bytes(layout), path.name) as segment:
            restore_image(path, layout, segment)
            sealed.append(segment.sealed)

    loads = [threading.Thread(target=load, args=image) for image in images]
    for thread in loads:
        thread.start()
    for thread in loads:
        thread.join(WAIT_S)
    assert sealed == [True, True]
    assert set(disk.under_way_max.values()) == {READ_THREADS}
    small = images[-1][0].name
    until_the_small_one_ended = disk.order[: len(disk.order) - disk.order[::-1].index(small)]
    counts = Counter(until_the_small_one_ended)
    assert max(counts.values()) <= counts[small] + READ_THREADS
