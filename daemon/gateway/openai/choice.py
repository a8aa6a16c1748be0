"""One choice of an answer: a worker's outputs become text, a finish reason and counts.

It decodes, watches for stop strings and keeps log probabilities in step with the text; it neither
waits nor writes. Invariant: the pieces it returns add up to the same text however the tokens were
grouped into outputs.
"""

from __future__ import annotations

from daemon.gateway.openai.logprobs import Entry, LogprobLog
from daemon.gateway.tokens.detokenise import Detokenizer
from daemon.gateway.tokens.stops import StopMatcher
from engine.link.tokens import Finish, Output


class Choice:
    """`finish` is None until the choice has ended, then OpenAI's finish_reason."""

    __slots__ = (
        "_decoded",
        "_detokenizer",
        "_log",
        "_shown",
        "_stops",
        "begun",
        "cached_tokens",
        "entries",
        "finish",
        "index",
        "tokens",
    )

    def __init__(
        self, index: int, detokenizer: Detokenizer, stops: tuple[str, ...], *, logprobs: bool
    ) -> None:
        self.index = index
        self.finish: str | None = None
        self.tokens = 0
        self.cached_tokens = 0
        self.begun = False
        """Whether any output has come."""
        self.entries: list[Entry] = []
        """Log probabilities that belong to the text last returned."""
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops) if stops else None
        self._log = LogprobLog() if logprobs else None
        self._decoded = 0
        self._shown = 0

    def advance(self, output: Output) -> str:
        """The text that this output lets be shown."""
        self.begun = True
        if output.cached_tokens:
            self.cached_tokens = output.cached_tokens
        if self._stops is None and self._log is None:
            self.tokens += len(output.tokens)
            text = self._detokenizer.step(output.tokens)
        else:
            text = self._advance_singly(output)
        if output.finish is not None and self.finish is None:
            self.finish = "length" if output.finish is Finish.LENGTH else "stop"
        return text

    def _advance_singly(self, output: Output) -> str:
        shown: list[str] = []
        stops = self._stops
        for place, token in enumerate(output.tokens):
            self.tokens += 1
            text = self._detokenizer.step((token,))
            if self._log is not None and place < len(output.logprobs):
                self._log.add(self._decoded, token, output.logprobs[place])
            self._decoded += len(text)
            if stops is not None:
                text = stops.step(text)
            shown.append(text)
            if stops is not None and stops.matched is not None:
                self.finish = "stop"
                break
        if output.finish is not None and stops is not None and stops.matched is None:
            shown.append(stops.flush())
        joined = "".join(shown)
        self._shown += len(joined)
        if self._log is not None:
            stopped = stops is not None and stops.matched is not None
            all_shown = not stopped and (self._shown == self._decoded)
            self.entries = self._log.take(self._shown, all_shown=all_shown)
        return joined
