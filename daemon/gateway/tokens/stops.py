"""Stop strings: where a text ends, and what of it may be shown already.

The matcher holds back exactly the longest end of the text that may still become a stop string, so
that no part of one is ever shown, and nothing else waits. Each character is looked at a bounded
number of times: what is held is shorter than the longest stop string.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one sequence for `stops`, none of which is empty."""

    __slots__ = ("_first", "_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._first = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None

    def step(self, text: str) -> str:
        """Take further text; the part that may be shown. Once `matched` is set, the last part."""
        if not text:
            return ""
        text = self._held + text
        # The one that is complete first wins, then the longer: so that how the text was cut into
        # pieces does not show.
        found = [
            (place + len(stop), place, stop)
            for stop in self._stops
            if (place := text.find(stop)) >= 0
        ]
        if found:
            _, end, self.matched = min(found)
        else:
            end = self._safe(text)
            self._held = text[end:]
        return text[:end]

    def flush(self) -> str:
        """What was held back, when the sequence ends without a stop string."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held

    def _safe(self, text: str) -> int:
        for place, character in enumerate(text):
            if character in self._first:
                rest = text[place:]
                if any(stop.startswith(rest) for stop in self._stops):
                    return place
        return len(text)
