"""Tokens per second of a whole list of requests at once, beside transformers in the same run.

    python -m bench.offline --model 28M --workload chats                        on the processor
    python -m bench.offline --device cuda --model 8B --workload chats           on a GPU
    python -m bench.offline --device cuda --model 0.6B --workload uniform

Chats are 1,000 requests of the committed table, uniform are 256 of 100 to 1,024 tokens in and out.
All requests are given at once; both sides have KV for all of them, or for as many tokens as
KV_TOKENS_MAX where that is less. A part of the list goes through both beforehand,
which is not counted. On the processor, and with `--part`, every so many of the list are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.engine_stage import KV_TOKENS_MAX, MODELS, Run, Stage, arguments, run_engine, stage_of
from bench.lengths import Lengths, chats, uniform
from bench.results import Figure, report
from bench.roofline import decode_bytes, measure
from engine.kv_layout import BLOCK_TOKENS_MAX
from engine.limits import EngineLimits

WORKLOADS: dict[str, Callable[[], list[Lengths]]] = {"chats": chats, "uniform": uniform}
PUBLISHED_TOKENS_PER_S = 16_215
"""Of SGLang on an H100, 8B in bf16, 1,000 chats: published, not measured here."""
RATIO_REACH = {("8B", "chats"): 4.0, ("0.6B", "uniform"): 5.0}
RUNNING_MAX = {"cuda": 256, "cpu": 32}
STEP_TOKENS = {"cuda": 8192, "cpu": 512}
WARM_REQUESTS = 16
HOST_PART = 16
FAKE_PART, FAKE_DIVISOR = 200, 16


def requests_of(workload: str, part: int, divisor: int = 1) -> list[Lengths]:
    """Every `part`-th of a workload, its lengths divided."""
    return [
        Lengths(max(1, one.prompt // divisor), max(1, one.answer // divisor))
        for one in WORKLOADS[workload]()[::part]
    ]


def through_engine(stage: Stage, requests: list[Lengths], seed: int) -> Run:
    """All requests through an engine made for them."""
    kind = stage.device.type
    longest = max(one.prompt + one.answer for one in requests)
    running = min(RUNNING_MAX[kind], len(requests))
    limits = EngineLimits(longest + 1, running, len(requests), STEP_TOKENS[kind])
    wanted = sum(one.prompt + one.answer + 2 * BLOCK_TOKENS_MAX for one in requests)
    with stage.engine(limits, max(min(wanted, KV_TOKENS_MAX), longest + 1)) as engine:
        prompts = stage.prompts([one.prompt for one in requests], seed)
        return run_engine(engine, prompts, [one.answer for one in requests])


def through_peer(stage: Stage, requests: list[Lengths], seed: int) -> Run:
    """All requests through transformers."""
    prompts = stage.prompts([one.prompt for one in requests], seed)
    answers = [one.answer for one in requests]
    return stage.run_peer(prompts, answers, STEP_TOKENS[stage.device.type])


def least_s(stage: Stage, requests: list[Lengths], bytes_per_s: float) -> float:
    """What reading alone would take: all weights for each step of a full batch, and the keys and
    values of each token's context."""
    running = min(RUNNING_MAX[stage.device.type], len(requests))
    weights = decode_bytes(stage.spec, stage.dtype, 0, 0)
    token = stage.spec.kv_bytes_per_token(stage.dtype)
    steps = max(max(one.answer for one in requests), sum(r.answer for r in requests) / running)
    seen = sum(one.answer * (one.prompt + one.answer / 2) for one in requests)
    return (steps * weights + seen * token) / bytes_per_s


def main(values: Sequence[str] | None = None) -> int:
    """Run, print, and exit 1 when a bound is missed."""
    parser = arguments("bench.offline", MODELS, "28M")
    parser.add_argument("--workload", choices=tuple(WORKLOADS), default="chats")
    parser.add_argument("--part", type=int, help="take every so many of the requests")
    options = parser.parse_args(values)
    cuda = options.device == "cuda" and not options.fake
    part = options.part or (FAKE_PART if options.fake else 1 if cuda else HOST_PART)
    requests = requests_of(options.workload, part, FAKE_DIVISOR if options.fake else 1)
    stage = stage_of(options, max(one.prompt + one.answer for one in requests) + 1)
    limits = measure(stage.device, stage.dtype, small=options.fake)
    asked = sum(one.answer for one in requests)

    through_engine(stage, requests[:WARM_REQUESTS], 2)
    own = through_engine(stage, requests, 1)
    assert own.generated == asked, "every answer has its length"
    rate = own.generated / own.seconds
    judged = cuda and part == 1
    ratio_reach = RATIO_REACH.get((options.model, options.workload)) if judged else None
    published = judged and (options.model, options.workload) == ("8B", "chats")
    share = least_s(stage, requests, limits.bytes_per_s) / own.seconds
    prompts = sum(one.prompt for one in requests)
    first = sorted(own.first_token_s)
    figures = [
        Figure("memory, measured", f"{limits.bytes_per_s / 1e9:.1f} GB/s"),
        Figure(
            f"{len(requests)} requests: tokens generated per second",
            f"{rate:.0f}",
            f"> {PUBLISHED_TOKENS_PER_S} (published for an H100)" if published else "",
            rate > PUBLISHED_TOKENS_PER_S if published else None,
        ),
        Figure("  prompts counted too", f"{(own.generated + prompts) / own.seconds:.0f}"),
        Figure("  share of what reading alone allows", f"{share:.1%}"),
        Figure("  first token, median of all given at once", f"{first[len(first) // 2]:.2f} s"),
    ]
    peer_s: float | None = None
    try:
        through_peer(stage, requests[:WARM_REQUESTS], 2)
        peer = through_peer(stage, requests, 1)
        assert peer.generated == asked, "the same work"
        peer_s = peer.seconds
        figures.append(
            Figure(
                "engine over generate_batch",
                f"{peer_s / own.seconds:.2f} x ({peer.generated / peer_s:.0f} tokens/s)",
                f">= {ratio_reach} x" if ratio_reach else "",
                peer_s / own.seconds >= ratio_reach if ratio_reach else None,
            )
        )
    except Exception as error:  # whatever the peer fails of, the engine's figures stand
        figures.append(Figure("generate_batch", f"failed: {type(error).__name__}: {error}"))
    met = report(
        f"offline, {options.workload}, {options.model} in {stage.dtype} on {stage.device.type}"
        + (" (dry run)" if options.fake else ""),
        figures,
        parameters={
            "shape": stage.spec.to_dict(),
            "dtype": stage.dtype,
            "threads": options.threads,
            "requests": len(requests),
            "prompt_tokens": prompts,
            "answer_tokens": asked,
        },
        measurements={"engine_s": own.seconds, "peer_s": peer_s},
        output=options.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
