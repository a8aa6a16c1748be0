"""How much of a step is the host's time that the device waits for.

    python -m bench.hidden --model 28M                          on the processor
    python -m bench.hidden --device cuda --model 8B             on a GPU

On a GPU each step is enclosed by two events on the device's own clock: what lies between the end of
one step and the beginning of the next is time in which the device had nothing to do. On a processor
nothing overlaps, and it is what a step takes besides computing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.decode import STEPS_TIMED, Grid, full_engine
from bench.engine_stage import MODELS, arguments, stage_of
from bench.results import Figure, report
from engine.engine import Engine

REACH = 0.03
BATCHES = {"cuda": 128, "cpu": 32, "fake": 2}


class Watched:
    """A stepper whose launches are timed; `edges` are (begin, end) of each."""

    def __init__(self, stepper: Any, device: torch.device) -> None:
        self._stepper = stepper
        self._device = device
        self.edges: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stepper, name)

    def launch(self, *arguments: Any, **named: Any) -> Any:
        begin = self._edge()
        launched = self._stepper.launch(*arguments, **named)
        self.edges.append((begin, self._edge()))
        return launched

    def _edge(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def gaps(engine: Engine, device: torch.device) -> tuple[float, float]:
    """Seconds between steps, and of steps and what is between them."""
    watched = Watched(engine._stepper, device)
    engine._stepper = watched
    for _ in range(STEPS_TIMED):
        engine.step()
    if device.type != "cuda":
        between = [late[0] - early[1] for early, late in itertools.pairwise(watched.edges)]
        return sum(between), watched.edges[-1][0] - watched.edges[0][0]
    torch.cuda.synchronize()
    pairs = itertools.pairwise(watched.edges)
    between = [early[1].elapsed_time(late[0]) / 1e3 for early, late in pairs]
    return sum(between), watched.edges[0][0].elapsed_time(watched.edges[-1][0]) / 1e3


def main(values: Sequence[str] | None = None) -> int:
    """Run, print, and exit 1 when the bound is missed."""
    parser = arguments("bench.hidden", MODELS, "28M")
    options = parser.parse_args(values)
    kind = "fake" if options.fake else options.device
    batch = BATCHES[kind]
    grid = Grid.of(options.model, options.device, fake=options.fake)
    stage = stage_of(options, grid.context_tokens)
    context = grid.contexts[0]
    with full_engine(stage, grid, batch, context) as engine:
        between_s, whole_s = gaps(engine, stage.device)
    share, judged = between_s / whole_s, kind == "cuda"
    met = report(
        f"host time between steps, {options.model} in {stage.dtype} on {stage.device.type}"
        + (" (dry run)" if options.fake else ""),
        [
            Figure(
                f"not hidden, batch {batch}, context {context}",
                f"{share:.1%} of {whole_s / (STEPS_TIMED - 1) * 1e3:.2f} ms",
                f"< {REACH:.0%}" if judged else "",
                share < REACH if judged else None,
            )
        ],
        parameters={
            "shape": stage.spec.to_dict(),
            "dtype": stage.dtype,
            "threads": options.threads,
            "batch": batch,
            "context": context,
        },
        measurements={"between_s": between_s, "whole_s": whole_s, "steps": STEPS_TIMED},
        output=options.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
