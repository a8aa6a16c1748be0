"""How near decoding is to the device's memory rate, by batch and context, beside transformers.

    python -m bench.decode --model 28M                          on the processor
    python -m bench.decode --device cuda --model 8B             on a GPU

Every case is a full batch of requests whose contexts have been computed; steps are then timed
together, and held against the bytes that such a step must read, at the rate that the memory gave in
the same run. transformers' continuous batching decodes the same batches at the shortest context: of
two runs that differ only in how many tokens they draw, the difference is its decoding. Cases whose
KV would take more than is there are left out and named.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.engine_stage import MODELS, Stage, arguments, stage_of
from bench.results import Figure, report
from bench.roofline import Limits, decode_bytes, measure
from engine.engine import Engine
from engine.kv_layout import BLOCK_TOKENS_MAX
from engine.limits import EngineLimits
from engine.link.tokens import Sampling

STEPS_WARM, STEPS_TIMED = 4, 32
PEER_TOKENS = (8, 40)
SPARE_TOKENS = 8
"""Drawn beyond what is timed at most, so that nobody ends meanwhile."""
REACH: dict[tuple[str, int], float] = {("8B", 1): 0.80, ("1B", 1): 0.60}
REACH |= {("8B", 32): 0.75, ("8B", 128): 0.75}
"""Shares of the memory's rate at the shortest context, by model and batch."""
CONTEXT_RATIO_OFF_MAX = 0.10


@dataclass(frozen=True)
class Grid:
    """What is measured. `kv_tokens_max` bounds batch times context, `peer_batches` the peer's."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    peer_batches: tuple[int, ...]
    kv_tokens_max: int
    step_tokens: int

    @classmethod
    def of(cls, model: str, device: str, *, fake: bool) -> Grid:
        if fake:
            return cls((1, 3), (24, 48), (3,), 96, 64)
        if device == "cuda":
            # Of an 8B in bf16, 360,000 tokens of KV are 47 GB. Contexts are computed like any
            # prompt, which is most of what this takes.
            batches = (1, 8, 32, 128, 256)
            return cls(batches, (1024, 8192, 32_768), (1, 8, 32, 128), 300_000, 8192)
        return cls((1, 8, 32), (128, 1024), (1, 8, 32), 40_000, 512)

    def cases(self) -> list[tuple[int, int]]:
        """Batches and contexts of which there is room for the KV."""
        return [
            (batch, context)
            for context in self.contexts
            for batch in self.batches
            if batch * context <= self.kv_tokens_max
        ]

    @property
    def context_tokens(self) -> int:
        """What the longest request comes to."""
        computing = -(-self.kv_tokens_max // self.step_tokens)
        drawn = computing + STEPS_WARM + STEPS_TIMED + SPARE_TOKENS
        return max(self.contexts) + max(drawn, *PEER_TOKENS)


@dataclass
class Found:
    """Seconds of a step by "batch x context", and the peer's; why the peer has none."""

    limits: list[Limits] = field(default_factory=list)
    step_s: dict[str, float] = field(default_factory=dict)
    peer_step_s: dict[str, float] = field(default_factory=dict)
    peer_error: str = ""


def drawn_tokens(grid: Grid, batch: int, context: int) -> int:
    """How many tokens each request is to draw, so that all still run when steps have been timed.

    The first to be admitted decode while the others' contexts are computed.
    """
    computing = -(-batch * context // grid.step_tokens)
    return computing + STEPS_WARM + STEPS_TIMED + SPARE_TOKENS


@contextlib.contextmanager
def full_engine(stage: Stage, grid: Grid, batch: int, context: int) -> Iterator[Engine]:
    """An engine that has computed the contexts of a full batch, and decodes all of it each step.

    Its requests are forgotten at the end.
    """
    count = drawn_tokens(grid, batch, context)
    limits = EngineLimits(context + count, batch, batch, max(grid.step_tokens, batch))
    with stage.engine(limits, batch * (context + count + BLOCK_TOKENS_MAX)) as engine:
        sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
        for number, prompt in enumerate(stage.prompts([context] * batch)):
            engine.submit(number, prompt, sampling)
        begun: set[int] = set()
        while len(begun) < batch:
            begun.update(output.request for output in engine.step() if output.tokens)
        for _ in range(STEPS_WARM):
            engine.step()
        yield engine
        if engine.running != batch:
            raise RuntimeError(f"{engine.running} of {batch} requests were left at the end")
        for number in range(batch):
            engine.cancel(number)


def decode_s(stage: Stage, grid: Grid, batch: int, context: int) -> float:
    """Seconds of one step of a full batch, averaged over STEPS_TIMED steps."""
    with full_engine(stage, grid, batch, context) as engine:
        drawn, started = 0, time.perf_counter()
        for _ in range(STEPS_TIMED):
            drawn += sum(len(output.tokens) for output in engine.step())
        return (time.perf_counter() - started) * batch / drawn


def peer_decode_s(stage: Stage, grid: Grid, batch: int, context: int) -> float:
    """The same of transformers: by how much longer a run takes that draws more tokens."""
    prompts = stage.prompts([context] * batch)
    taken = []
    for count in PEER_TOKENS:
        run = stage.run_peer(prompts, [count] * batch, max(grid.step_tokens, batch))
        if run.generated != batch * count:
            raise RuntimeError(f"the peer drew {run.generated} tokens, not {batch * count}")
        taken.append(run.seconds)
    return (taken[1] - taken[0]) / (PEER_TOKENS[1] - PEER_TOKENS[0])


def measure_all(stage: Stage, grid: Grid, *, fake: bool) -> Found:
    """Every case, the limits before and after them, and the peer beside the shortest context."""
    found = Found()
    found.limits.append(measure(stage.device, stage.dtype, small=fake))
    for batch, context in grid.cases():
        name = f"{batch} x {context}"
        found.step_s[name] = decode_s(stage, grid, batch, context)
        print(f"{name}: {1000 * found.step_s[name]:.2f} ms a step", flush=True)
        wanted = batch in grid.peer_batches and context == grid.contexts[0]
        if wanted and not found.peer_error:
            try:
                found.peer_step_s[name] = peer_decode_s(stage, grid, batch, context)
            except Exception as error:  # whatever the peer fails of, the engine's figures stand
                found.peer_error = f"{type(error).__name__}: {error}"
    found.limits.append(measure(stage.device, stage.dtype, small=fake))
    return found


def figures_of(model: str, stage: Stage, grid: Grid, found: Found, *, fake: bool) -> list[Figure]:
    """A line for each case. A dry run meets no bound: its times mean nothing."""
    rate = max(one.bytes_per_s for one in found.limits)
    figures = [Figure("memory, measured", f"{rate / 1e9:.1f} GB/s")]
    for batch, context in grid.cases():
        name = f"{batch} x {context}"
        step_s = found.step_s[name]
        share = decode_bytes(stage.spec, stage.dtype, batch, context) / rate / step_s
        reach = REACH.get((model, batch)) if context == grid.contexts[0] and not fake else None
        reach = reach if stage.device.type == "cuda" else None
        figures.append(
            Figure(
                f"decode, batch {batch}, context {context}: tokens/s, share of the memory's rate",
                f"{batch / step_s:.0f}, {share:.1%}",
                f">= {reach:.0%}" if reach else "",
                share >= reach if reach else None,
            )
        )
        if name in found.peer_step_s:
            peer_s = found.peer_step_s[name]
            figures.append(
                Figure(
                    "  the same over generate_batch",
                    f"{peer_s / step_s:.2f} x ({batch / peer_s:.0f} tokens/s)",
                )
            )
    figures += _ratio_of_contexts(stage, grid, found, fake=fake)
    if found.peer_error:
        figures.append(Figure("generate_batch", f"failed: {found.peer_error}"))
    left_out = len(grid.batches) * len(grid.contexts) - len(grid.cases())
    figures.append(
        Figure("cases left out, for their KV", f"{left_out}, of over {grid.kv_tokens_max} tokens")
    )
    return figures


def _ratio_of_contexts(stage: Stage, grid: Grid, found: Found, *, fake: bool) -> list[Figure]:
    """A step at the longest context over one at the shortest, beside what the bytes say."""
    short, long = grid.contexts[0], grid.contexts[-1]
    if (1, short) not in grid.cases() or (1, long) not in grid.cases():
        return []
    ratio = found.step_s[f"1 x {long}"] / found.step_s[f"1 x {short}"]
    expected = decode_bytes(stage.spec, stage.dtype, 1, long)
    expected_ratio = expected / decode_bytes(stage.spec, stage.dtype, 1, short)
    off = ratio / expected_ratio - 1
    judged = stage.device.type == "cuda" and not fake
    return [
        Figure(
            f"a step at context {long} over one at {short}, batch 1",
            f"{ratio:.2f} x, by the bytes {expected_ratio:.2f} x",
            f"within {CONTEXT_RATIO_OFF_MAX:.0%}" if judged else "",
            off <= CONTEXT_RATIO_OFF_MAX if judged else None,
        )
    ]


def main(values: Sequence[str] | None = None) -> int:
    """Run, print, and exit 1 when a bound is missed."""
    options: argparse.Namespace = arguments("bench.decode", MODELS, "28M").parse_args(values)
    grid = Grid.of(options.model, options.device, fake=options.fake)
    stage = stage_of(options, grid.context_tokens)
    found = measure_all(stage, grid, fake=options.fake)
    parameters: dict[str, Any] = {
        "shape": stage.spec.to_dict(),
        "dtype": stage.dtype,
        "threads": options.threads,
        "steps_timed": STEPS_TIMED,
        "peer_tokens": PEER_TOKENS,
    }
    met = report(
        f"decode, {options.model} in {stage.dtype} on {stage.device.type}"
        + (" (dry run)" if options.fake else ""),
        figures_of(options.model, stage, grid, found, fake=options.fake),
        parameters=parameters,
        measurements={
            "memory_bytes_per_s": [one.bytes_per_s for one in found.limits],
            "step_s": found.step_s,
            "peer_step_s": found.peer_step_s,
        },
        output=options.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
