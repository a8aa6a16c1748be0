"""The hold queue: streams whose model is not served yet, or whose worker is away.

It owns the order and the bound, and never decides when to release. Invariant: streams of one model
leave in the order in which they arrived at the gateway, a replayed one in its old place.
"""

from __future__ import annotations

from collections.abc import Iterable

from daemon.gateway.streams import Stream


class HoldQueue:
    """Held streams by model. `requests_max` bounds newcomers; replays were admitted before."""

    def __init__(self, requests_max: int) -> None:
        self.requests_max = requests_max
        self._by_model: dict[str, dict[int, Stream]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether a new stream has to be turned away."""
        return self._count >= self.requests_max

    def add(self, stream: Stream) -> None:
        """Hold a stream. Whoever adds a newcomer has looked at `full` first."""
        self._by_model.setdefault(stream.model, {})[stream.serial] = stream
        self._count += 1

    def remove(self, stream: Stream) -> None:
        """Let a held stream go, to a worker or because it ended."""
        streams = self._by_model[stream.model]
        del streams[stream.serial]
        self._count -= 1
        if not streams:
            del self._by_model[stream.model]

    def holds(self, model: str) -> bool:
        """Whether anything of this model is held."""
        return model in self._by_model

    def models(self) -> Iterable[str]:
        """Models of which anything is held."""
        return tuple(self._by_model)

    def of(self, model: str) -> list[Stream]:
        """The held streams of a model, first come first."""
        streams = self._by_model.get(model, {})
        return [streams[serial] for serial in sorted(streams)]
