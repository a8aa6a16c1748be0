"""From a request for a model that is away to its first token, through a whole node.

    python -m bench.demand [--rounds 9] [--output bench/results/demand.json]

Two models of 1 GiB share one partition of a real node on which one may be active. Each round
copies as many bytes with one memmove, then asks over HTTP for the model that is away: the gateway
holds the request, hotbayd swaps, the worker copies and computes. What is held against the copy is
everything from sending the request to the first byte of the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from hotbay.local_node import LocalNode
from transformers import LlamaConfig, LlamaForCausalLM

from bench import swap
from bench.load_client import Load, run_load
from bench.results import Figure, report
from bench.worker import build_model, decoder

TOKENIZER = Path(__file__).resolve().parents[1] / "examples/models/prose/1/tokenizer.json"
WARM_ROUNDS = 4
RATIO_MAX, OVERHEAD_S = 1.25, 0.05


def write_checkpoint(directory: Path, seed: int) -> None:
    """Random weights in the shape of `bench.swap`, with a tokenizer for the prompt's ids."""
    spec = decoder(swap.VOCABULARY, swap.HIDDEN, swap.LAYERS)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context_tokens,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    shutil.copy(TOKENIZER, directory)


def first_byte_s(url: str, model: str) -> float:
    """Ask for one token, streamed; seconds from sending to the first byte of the answer."""
    body = {
        "model": model,
        "prompt": list(swap.PROMPT),
        "max_tokens": 1,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    answer = asyncio.run(run_load(Load(f"{url}/v1/completions", [body], 1))).answers[0]
    if answer.error:
        raise RuntimeError(answer.error)
    return answer.first_byte_s - answer.started_s


def wait_until_present(node: LocalNode, memory_bytes: int) -> None:
    """Until the worker has made all of its memory present: a swap is not to pay for that."""
    (pid,) = [each.pid for each in node.client.node().processes if each.role == "worker"]
    deadline_s = time.monotonic() + swap.PRESENT_TIMEOUT_S
    while True:
        memory = psutil.Process(pid).memory_info()
        if memory.rss - memory.shared >= memory_bytes:
            return
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{memory_bytes} bytes were not present within a while")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    image = build_model("copied@1", decoder(swap.VOCABULARY, swap.HIDDEN, swap.LAYERS), seed=1)
    weights_bytes = image.manifest.weights_bytes
    copy = swap.Memcpy(weights_bytes, image.segment)
    memory_bytes = weights_bytes + (256 << 20)
    config: dict[str, dict[str, Any]] = {
        "worker": {"memory_bytes": memory_bytes},
        "scheduling": {"max_active_models": 1, "min_residency_s": 0.0},
    }
    copies, answers = [], []
    with tempfile.TemporaryDirectory(prefix="hotbay-bench-") as root:
        for seed in (1, 2):
            write_checkpoint(Path(root) / "models" / f"large{seed}" / "1", seed)
        node = LocalNode(Path(root) / "node", repository=Path(root) / "models", config=config)
        with node:
            for seed in (1, 2):
                node.client.wait(node.client.load(f"large{seed}"))
            wait_until_present(node, memory_bytes)
            url = node.http_url
            for number in range(WARM_ROUNDS + arguments.rounds):
                copy_s = copy.seconds()
                answer_s = first_byte_s(url, f"large{2 - number % 2}")
                if number >= WARM_ROUNDS:
                    copies.append(copy_s)
                    answers.append(answer_s)
    copy_s, answer_s = statistics.median(copies), statistics.median(answers)
    limit_s = RATIO_MAX * copy_s + OVERHEAD_S
    figures = [
        Figure("one memcpy of the image", swap.milliseconds(copy_s)),
        Figure(
            "HTTP request for the model that is away to its first byte",
            f"{swap.milliseconds(answer_s)} ({answer_s / copy_s:.2f} x memcpy)",
            f"<= {RATIO_MAX:g} x memcpy + {OVERHEAD_S * 1000:.0f} ms = "
            f"{swap.milliseconds(limit_s)}",
            answer_s <= limit_s,
        ),
    ]
    met = report(
        "A swap on demand, through a whole node",
        figures,
        parameters={
            "weights_bytes": weights_bytes,
            "memory_bytes": memory_bytes,
            "rounds": arguments.rounds,
            "vocabulary": swap.VOCABULARY,
            "hidden": swap.HIDDEN,
            "layers": swap.LAYERS,
            "prompt_tokens": len(swap.PROMPT),
            "dtype": "float32",
        },
        measurements={"memcpy_s": copies, "first_byte_s": answers},
        output=arguments.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
