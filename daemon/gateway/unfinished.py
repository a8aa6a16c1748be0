"""The streams that have not ended, by model, and the demand that follows from them.

It counts and never moves a stream. Demand is every unfinished stream of a model that is not served,
whether it is held here or parked at a worker: both wait for the same thing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from daemon.gateway.streams import Stream
from daemon.gateway.table import Table
from engine.link.routes import ModelDemand


class Unfinished:
    """All unfinished streams, in the order of arrival within a model."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[int, Stream]] = {}
        self._unserved_since_s: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_model.values()))

    def __iter__(self) -> Iterator[Stream]:
        for streams in list(self._by_model.values()):
            yield from list(streams.values())

    def add(self, stream: Stream) -> None:
        """A stream was taken on."""
        self._by_model.setdefault(stream.model, {})[stream.serial] = stream

    def remove(self, stream: Stream) -> None:
        """A stream has ended."""
        streams = self._by_model[stream.model]
        del streams[stream.serial]
        if not streams:
            del self._by_model[stream.model]

    def table_changed(self, table: Table) -> None:
        """Note since when each model has not been served."""
        now_s = time.monotonic()
        self._unserved_since_s = {
            key: self._unserved_since_s.get(key, now_s)
            for key in table.by_key
            if not table.serves(key)
        }

    def demand(self) -> tuple[ModelDemand, ...]:
        """What waits for a model to be served, by the last table."""
        now_s = time.monotonic()
        demands = []
        for model, streams in self._by_model.items():
            unserved_since_s = self._unserved_since_s.get(model)
            if unserved_since_s is not None:
                oldest = next(iter(streams.values()))
                waiting_s = now_s - max(oldest.arrived_s, unserved_since_s)
                demands.append(ModelDemand(model, len(streams), waiting_s))
        return tuple(demands)
