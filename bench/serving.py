"""Tokens per second through HTTP beside the engine alone, in one run.

    GOMP_SPINCOUNT=5000 python -m bench.serving [--output bench/results/serving.json]

The variable is what the worker sets for itself: so both engines wait for their threads alike.

The engine runs in this process; the node (daemon, gateway, worker) beside it serves the same
weights as a checkpoint. Both get the same 32 greedy requests, given as token ids; through HTTP they
are streamed. Rounds alternate, so that drift of the machine's speed meets both; each side is judged
by its best round.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from hotbay.local_node import LocalNode
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bench import engine as engine_bench
from bench.load_client import Load, Report, run_load
from bench.results import Figure, report
from engine.kv_space import PlainKvSpace

REACH = 0.9
REQUESTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 32, 64, 128, 4


def write_checkpoint(model: torch.nn.Module, directory: Path) -> None:
    """The benchmark's model with a tokenizer of its vocabulary, as the daemon reads them."""
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    trainer = trainers.BpeTrainer(
        vocab_size=engine_bench.VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sources], trainer)
    assert tokenizer.get_vocab_size() == engine_bench.VOCABULARY
    tokenizer.save(str(directory / "tokenizer.json"))


def through_http(url: str, prompts: list[list[int]]) -> Report:
    """All prompts at once, streamed."""
    bodies = [
        {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        for prompt in prompts
    ]
    return asyncio.run(run_load(Load(f"{url}/v1/completions", bodies, len(bodies))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    model, spec, weights = engine_bench.build(seed=0)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(
        0, engine_bench.VOCABULARY, (REQUESTS, PROMPT_TOKENS), generator=generator
    ).tolist()
    space = PlainKvSpace(engine_bench.PAGE_BYTES, engine_bench.KV_PAGES)
    alone, served = [], []
    with tempfile.TemporaryDirectory(prefix="hotbay-bench-") as root:
        write_checkpoint(model, Path(root) / "models" / "bench" / "1")
        # Each round has the same prompts, which are to be computed each time.
        node = LocalNode(
            Path(root) / "node",
            repository=Path(root) / "models",
            config={"worker": {"prefix_cache": False}},
        )
        with node:
            node.client.wait(node.client.load("bench"))
            url = node.http_url
            through_http(url, prompts[:4])
            engine_bench.run_engine(spec, weights, space, prompts[:4], 8)
            for _ in range(arguments.rounds):
                timing = engine_bench.run_engine(spec, weights, space, prompts, NEW_TOKENS)
                alone.append(timing.rate)
                answer = through_http(url, prompts)
                assert not answer.errors, answer.errors
                assert answer.tokens == sum(map(len, timing.tokens)), "the same work"
                served.append(answer.tokens / answer.wall_s)
    ratio = max(served) / max(alone)
    figure = Figure(
        "tokens/s of 32 concurrent greedy requests: HTTP, streamed, against the engine alone",
        f"{ratio:.2f} x ({max(served):.0f} against {max(alone):.0f} tokens/s)",
        f"at least {REACH} x",
        ratio >= REACH,
    )
    met = report(
        "Serving through HTTP",
        [figure],
        parameters={
            "requests": REQUESTS,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "parameters": sum(weight.numel() for weight in weights.values()),
        },
        measurements={"engine_tokens_per_s": alone, "http_tokens_per_s": served},
        output=arguments.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
