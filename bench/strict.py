"""What strict results cost: decoding and prompts of an engine with `strict` and of one without.

    python -m bench.strict --model 28M                          on the processor
    python -m bench.strict --device cuda --model 8B             on a GPU

Both run the same requests of random tokens in turn, in one process. Nothing is judged: strict
results are off by default, and this is their price.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.engine_stage import MODELS, Stage, arguments, stage_of
from bench.results import Figure, report
from engine.limits import EngineLimits
from engine.link.tokens import Sampling

BATCHES = {"cuda": (1, 32, 128), "cpu": (1, 8, 32), "fake": (1, 2)}
PROMPT_TOKENS = {"cuda": 512, "cpu": 128, "fake": 12}
NEW_TOKENS = {"cuda": 64, "cpu": 32, "fake": 4}
STEP_TOKENS = 512


def seconds_of(stage: Stage, kind: str, batch: int, *, strict: bool) -> tuple[float, float]:
    """Seconds until every request has its first token, and from there on for each further token
    of all of them."""
    prompt_tokens, new_tokens = PROMPT_TOKENS[kind], NEW_TOKENS[kind]
    context = prompt_tokens + new_tokens
    limits = EngineLimits(context, batch, batch, STEP_TOKENS, prefix_cache=False, strict=strict)
    with stage.engine(limits, batch * (context + 32)) as engine:
        sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for number, prompt in enumerate(stage.prompts([prompt_tokens] * batch)):
            engine.submit(number, prompt, sampling)
        began, begun, drawn = time.perf_counter(), set[int](), 0
        while len(begun) < batch:
            begun.update(output.request for output in engine.step() if output.tokens)
        first = time.perf_counter()
        while engine.has_work:
            drawn += sum(len(output.tokens) for output in engine.step())
        return first - began, (time.perf_counter() - first) * batch / max(drawn, 1)


def main(values: Sequence[str] | None = None) -> int:
    """Run and print."""
    parser = arguments("bench.strict", MODELS, "28M")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(values)
    kind = "fake" if options.fake else options.device
    stage = stage_of(options, PROMPT_TOKENS[kind] + NEW_TOKENS[kind])
    figures, measurements = [], {}
    for batch in BATCHES[kind]:
        taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(options.rounds + 1):
            for strict in (False, True):
                found = seconds_of(stage, kind, batch, strict=strict)
                if number:  # the first round makes kernels and graphs
                    taken[strict].append(found)
        for index, what in enumerate(("prompts to first tokens", "a token of each")):
            plain, exact = (min(one[index] for one in taken[strict]) for strict in (False, True))
            figures.append(
                Figure(
                    f"batch {batch}: {what}",
                    f"{exact * 1e3:.2f} against {plain * 1e3:.2f} ms: {exact / plain:.2f} x",
                )
            )
        measurements[f"batch {batch}"] = [taken[False], taken[True]]
    report(
        f"strict results, {options.model} in {stage.dtype} on {stage.device.type}"
        + (" (dry run)" if options.fake else ""),
        figures,
        parameters={
            "shape": stage.spec.to_dict(),
            "dtype": stage.dtype,
            "threads": options.threads,
            "prompt_tokens": PROMPT_TOKENS[kind],
            "new_tokens": NEW_TOKENS[kind],
        },
        measurements=measurements,
        output=options.output,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
