"""How long a prompt takes to its first token, and how near computing it is to the matmul rate.

    python -m bench.first_token --model 28M                     on the processor
    python -m bench.first_token --device cuda --model 8B        on a GPU

One request at a time, of several lengths. The longest is held against the operations it needs, at
the rate that a large matrix product gave in the same run. The longest is then sent again, which
shows what a prefix that is still known saves; transformers' continuous batching computes it too.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.engine_stage import MODELS, Stage, arguments, run_engine, stage_of
from bench.results import Figure, report
from bench.roofline import measure, prefill_operations
from engine.kv_layout import BLOCK_TOKENS_MAX
from engine.limits import EngineLimits

PREFILL_REACH = 0.60
ROUNDS = 5
LENGTHS = {"cuda": (64, 1024, 8192), "cpu": (64, 512, 1024), "fake": (8, 40)}
STEP_TOKENS = {"cuda": 8192, "cpu": 512, "fake": 32}
NEW_TOKENS = 2
AGAIN = "again"


def measure_prompts(stage: Stage, kind: str, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token by the prompt's length, and of the longest when it comes again.

    Every other prompt is a new one. What the first round takes is not counted.
    """
    lengths = LENGTHS[kind]
    longest = max(lengths) + NEW_TOKENS
    limits = EngineLimits(longest, 4, 8, STEP_TOKENS[kind])
    found: dict[str, list[float]] = {}
    with stage.engine(limits, 4 * (longest + BLOCK_TOKENS_MAX)) as engine:
        for number in range(rounds + 1):
            sent = [(str(one), stage.prompts([one], 1000 * number + one)) for one in lengths]
            for name, prompts in (*sent, (AGAIN, sent[-1][1])):
                run = run_engine(engine, prompts, [NEW_TOKENS])
                if number:
                    found.setdefault(name, []).append(run.first_token_s[0])
    return found


def measure_peer(stage: Stage, kind: str) -> float:
    """Seconds that transformers takes for one token after the longest prompt, the better of two."""
    length = max(LENGTHS[kind])
    return min(
        stage.run_peer(stage.prompts([length], seed), [1], STEP_TOKENS[kind]).seconds
        for seed in (1, 2)
    )


def main(values: Sequence[str] | None = None) -> int:
    """Run, print, and exit 1 when a bound is missed."""
    parser = arguments("bench.first_token", MODELS, "28M")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(values)
    kind = "fake" if options.fake else options.device
    lengths = LENGTHS[kind]
    longest = max(lengths)
    stage = stage_of(options, longest + NEW_TOKENS)
    before = measure(stage.device, stage.dtype, small=options.fake)
    found = measure_prompts(stage, kind, options.rounds)
    after = measure(stage.device, stage.dtype, small=options.fake)
    rate = max(before.operations_per_s, after.operations_per_s)
    best = {name: min(seconds) for name, seconds in found.items()}
    share = prefill_operations(stage.spec, longest) / rate / best[str(longest)]
    judged = kind == "cuda"
    figures = [Figure("matrix products, measured", f"{rate / 1e12:.2f} Tflop/s")]
    figures += [
        Figure(
            f"prompt of {length} tokens, to its first token",
            f"{1000 * best[str(length)]:.1f} ms "
            f"(median {1000 * statistics.median(found[str(length)]):.1f} ms)",
        )
        for length in lengths
    ]
    figures.append(
        Figure(
            f"prefill of {longest} tokens: share of the measured matmul rate",
            f"{share:.1%} ({longest / best[str(longest)]:.0f} tokens/s)",
            f">= {PREFILL_REACH:.0%}" if judged else "",
            share >= PREFILL_REACH if judged else None,
        )
    )
    figures.append(
        Figure(
            f"the same prompt of {longest} tokens again",
            f"{1000 * best[AGAIN]:.1f} ms, {best[AGAIN] / best[str(longest)]:.2f} x the first time",
        )
    )
    try:
        peer_s = measure_peer(stage, kind)
        ratio = f"{peer_s / best[str(longest)]:.2f} x ours ({1000 * peer_s:.1f} ms)"
        figures.append(Figure(f"generate_batch, {longest} tokens to the first", ratio))
    except Exception as error:  # whatever the peer fails of, the engine's figures stand
        figures.append(Figure("generate_batch", f"failed: {type(error).__name__}: {error}"))
    met = report(
        f"first token, {options.model} in {stage.dtype} on {stage.device.type}"
        + (" (dry run)" if options.fake else ""),
        figures,
        parameters={
            "shape": stage.spec.to_dict(),
            "dtype": stage.dtype,
            "threads": options.threads,
            "rounds": options.rounds,
            "step_tokens": STEP_TOKENS[kind],
        },
        measurements={
            "operations_per_s": [before.operations_per_s, after.operations_per_s],
            "first_token_s": found,
        },
        output=options.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
