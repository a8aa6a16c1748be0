"""Two engines active at once in one worker against one engine with both their requests.

    python -m bench.together --model 28M                        on the processor
    python -m bench.together --device cuda --model 1B           on a GPU

Both engines decode a full batch each and take turns as they do in a worker; the one engine decodes
a batch of twice the size. Two engines read two sets of weights where one reads one, so what the
bytes allow is stated beside what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.decode import STEPS_TIMED, Grid, decode_s, full_engine
from bench.engine_stage import MODELS, Stage, arguments, stage_of
from bench.results import Figure, report
from bench.roofline import decode_bytes
from engine.engine import Engine
from engine.worker.turns import Turns

REACH = 0.9
BATCHES = {"cuda": 256, "cpu": 16, "fake": 2}
"""Of each of the two engines; on a GPU so many that most of what is read is keys and values."""


def together_s(engines: dict[str, Engine]) -> float:
    """Seconds in which each of the engines draws one token for each of its requests."""
    turns, drawn = Turns(), 0
    began = time.perf_counter()
    for _ in range(len(engines) * STEPS_TIMED // 2):
        name = turns.choose(engines)
        started = time.perf_counter()
        drawn += sum(len(output.tokens) for output in engines[name].step())
        turns.count(name, time.perf_counter() - started, 1.0)
    seconds = time.perf_counter() - began
    return seconds * sum(engine.running for engine in engines.values()) / drawn


def measure(stage: Stage, grid: Grid, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of a token for each request, of the two engines and of the one, in turn."""
    context = grid.contexts[0]
    two, one = [], []
    for _ in range(rounds):
        with (
            full_engine(stage, grid, batch, context) as first,
            full_engine(stage, grid, batch, context) as second,
        ):
            two.append(together_s({"first": first, "second": second}))
        one.append(decode_s(stage, grid, 2 * batch, context))
    return two, one


def main(values: Sequence[str] | None = None) -> int:
    """Run, print, and exit 1 when the bound is missed."""
    parser = arguments("bench.together", MODELS, "28M")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(values)
    kind = "fake" if options.fake else options.device
    batch = BATCHES[kind]
    grid = Grid.of(options.model, options.device, fake=options.fake)
    stage = stage_of(options, grid.context_tokens)
    two, one = measure(stage, grid, batch, options.rounds)
    context = grid.contexts[0]
    least = [decode_bytes(stage.spec, stage.dtype, count, context) for count in (2 * batch, batch)]
    share, judged = min(one) / min(two), kind == "cuda"
    met = report(
        f"two engines at once, {options.model} in {stage.dtype} on {stage.device.type}"
        + (" (dry run)" if options.fake else ""),
        [
            Figure(f"one engine, batch {2 * batch}", f"{2 * batch / min(one):.0f} tokens/s"),
            Figure(f"two engines, batch {batch} each", f"{2 * batch / min(two):.0f} tokens/s"),
            Figure(
                "two engines over one",
                f"{share:.2f} x; reading alone allows {least[0] / (2 * least[1]):.2f} x",
                f">= {REACH} x" if judged else "",
                share >= REACH if judged else None,
            ),
        ],
        parameters={
            "shape": stage.spec.to_dict(),
            "dtype": stage.dtype,
            "threads": options.threads,
            "batch": batch,
            "context": context,
        },
        measurements={"two_engines_s": two, "one_engine_s": one},
        output=options.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
