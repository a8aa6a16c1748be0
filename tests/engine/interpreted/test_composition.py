"""The same bits in every way of the table from strict engines with Triton's kernels: launched one
by one, and captured (see `engine.recorded_graphs`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from engine.device_stepper import DeviceStepper, Launched
from engine.recorded_graphs import RecordedGraphs
from tests.engine.checkpoints import greedy, run, tokens_of
from tests.engine.composition import Kind, Noted, check
from tests.engine.interpreted.tiny_model import (
    PAGE_BYTES,
    PROMPTS,
    SPEC,
    VOCABULARY,
    WEIGHTS,
    make_engine,
)

NEW_TOKENS, OTHERS_TOKENS = 5, 3
PROBE = PROMPTS[2]
LAUNCHED = ("among 7", "half of it found")
CAPTURED = (
    "alone",
    "among 63",
    "found among 7",
    "gives way, parked",
    "swapped out, KV parked",
    "swapped thrice, found, in chunks",
)
"""The interpreter takes its time: of the table what can differ here, each thing once."""
WAY_TIMEOUT_S = 300


class NotingStepper(DeviceStepper):
    """The device's way, watched: what reaches the sampler is copied to where graphs may write."""

    def __init__(self, noted: Noted, *arguments: Any, **shared: Any) -> None:
        super().__init__(*arguments, **shared)
        self._noted = noted
        self._seen = torch.zeros((len(self._sampler.results), VOCABULARY))
        launch = self._sampler.launch

        def watched(logits: torch.Tensor, *, rows: int, **given: Any) -> None:
            self._seen[:rows].copy_(logits[:rows])
            launch(logits, rows=rows, **given)

        sampler: Any = self._sampler
        sampler.launch = watched

    def _send_back(self, requests: Any, *arguments: Any) -> Launched:
        self._noted.note(self._seen, requests)
        return super()._send_back(requests, *arguments)


def given(noted: Noted, *, captured: bool) -> dict[str, Any]:
    graphs = RecordedGraphs() if captured else None
    return {"make_stepper": partial(NotingStepper, noted, graphs=graphs)}


def kind_of(*, captured: bool) -> Kind:
    return Kind(
        SPEC,
        WEIGHTS,
        probe=PROBE,
        others=[[(5 * index + 3) % VOCABULARY] for index in range(63)],
        rival=[(3 * place + 1) % VOCABULARY for place in range(26)],
        new_tokens=NEW_TOKENS,
        others_tokens=OTHERS_TOKENS,
        page_bytes=PAGE_BYTES,
        pages=200,
        pages_few=7,
        context_tokens=28,
        chunk_tokens=8,
        given=partial(given, captured=captured),
        captured=captured,
    )


@pytest.fixture(scope="module")
def expected() -> list[int]:
    reference = make_engine(device=False)
    reference.submit(0, PROBE, greedy(NEW_TOKENS))
    return tokens_of(run(reference)[0])


@pytest.fixture(scope="module")
def alone(expected: list[int]) -> Noted:
    return check(kind_of(captured=False), "alone", expected)


@pytest.mark.timeout(WAY_TIMEOUT_S)
@pytest.mark.parametrize(
    ("name", "captured"),
    [*((name, False) for name in LAUNCHED), *((name, True) for name in CAPTURED)],
)
def test_strict_engines_bring_the_same_bits(
    name: str, captured: bool, expected: list[int], alone: Noted
) -> None:
    check(kind_of(captured=captured), name, expected, alone)
