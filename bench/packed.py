"""What packed images save and cost: bits a weight, rates of packing and unpacking, and whole swaps.

    python -m bench.packed [--rounds 5] [--output bench/results/packed.json]
    python -m bench.packed --device cuda --model 8B [--output bench/results/gpu-packed-8b.json]

Sizes are of normally distributed weights and of the example models as bfloat16. Rates are of one
thread, in bytes of unpacked weights, beside a plain copy of as many bytes. Swaps alternate two
bfloat16 models on one worker, once as plain images and once packed, over a link throttled well
below the rate of unpacking, where packing pays, and over one that is not, where on a host device it
costs time. The worker is the real process. The second form is `bench.packed_cuda`'s.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.packed_cuda import measure_packed_swaps
from bench.results import Figure, report
from bench.shapes import GPU_SHAPES
from bench.swap import PROMPT, WARM_SWAPS, milliseconds
from bench.worker import ROOT, BenchWorker, BuiltModel, build_model, decoder
from engine.builder import inspect
from engine.link.build import PACKED_DTYPE
from swap.build import build_image
from swap.image import PIECE_WEIGHTS, segment_bytes
from swap.packing import CODE_BITS, Weights, pack, packed_bytes, read_piece, unpack
from swap.segment import Segment
from swap.unpacking import HostUnpacker

VOCABULARY, HIDDEN, LAYERS = 32_768, 512, 24
LINK_BYTES_PER_S = 200e6
SHARE_MAX = 0.80
"""Of the plain image's time, over a throttled link: what is asked of packed images on a GPU too."""
BITS_MAX = {3: 11.25, 4: 12.05}


def normal_weights(count: int) -> Weights:
    """Normally distributed, as bfloat16 bits, cut."""
    draw = np.random.default_rng(1).standard_normal(count, dtype=np.float32) * np.float32(0.02)
    return (draw.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def measure_sizes(weights: Weights) -> tuple[list[Figure], dict[str, Any]]:
    """Bits a weight with either code, and the share of the example models that is left."""
    shares = np.sort(np.bincount((weights >> np.uint16(7)) & 0xFF, minlength=256))[::-1]
    figures, measured = [], {}
    for bits in reversed(CODE_BITS):
        exceptions = len(weights) - int(shares[: (1 << bits) - 1].sum())
        taken = packed_bytes(len(weights), exceptions, bits) * 8 / len(weights)
        measured[f"bits_with_codes_of_{bits}"] = taken
        figures.append(
            Figure(
                f"normal weights, codes of {bits} bits",
                f"{taken:.2f} bits a weight, {exceptions / len(weights):.3%} exceptions",
                f"<= {BITS_MAX[bits]} of 16",
                taken <= BITS_MAX[bits],
            )
        )
    for model in ("prose", "code"):
        stored, plain = example_bytes(model, PACKED_DTYPE), example_bytes(model, "bfloat16")
        measured[f"{model}_share"] = stored / plain
        figures.append(
            Figure(
                f"example model {model}", f"{stored / plain:.3f} of {plain} bytes of plain bfloat16"
            )
        )
    return figures, measured


def example_bytes(model: str, dtype: str) -> int:
    """Bytes of an example model's image in memory."""
    found = inspect(str(ROOT / "examples" / "models" / model / "1"), dtype)
    with found.checkpoint, Segment.create(segment_bytes(found.layout), model) as segment:
        build_image(found.checkpoint, found.recipes, found.layout, segment)
        return segment.size_bytes


def measure_rates(weights: Weights, rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """Bytes of weights per second, packing and unpacking, beside a plain copy."""
    packed = pack(weights)
    assert packed is not None
    piece, out, unpacker = read_piece(packed, len(weights)), np.empty_like(weights), HostUnpacker()
    ways: dict[str, Callable[[], object]] = {
        "plain copy": lambda: np.copyto(out, weights),
        "packing": lambda: pack(weights),
        "unpacking, the reference": lambda: unpack(piece),
        "unpacking, as a host device does": lambda: unpacker.unpack_into(piece, out),
    }
    rates = {}
    for name, run in ways.items():
        run()
        rates[name] = weights.nbytes / statistics.median(_seconds(run) for _ in range(rounds))
    copy = rates["plain copy"]
    figures = [
        Figure(name, f"{rate / 1e9:.2f} GB/s of weights ({rate / copy:.3f} x plain copy)")
        for name, rate in rates.items()
    ]
    return figures, {"bytes_per_s": rates, "code_bits": piece.code_bits}


async def measure_swaps(rounds: int) -> tuple[list[Figure], dict[str, Any]]:
    """Exchange to first token, plain and packed, throttled and not."""
    spec = decoder(VOCABULARY, HIDDEN, LAYERS)
    seconds: dict[str, list[float]] = {}
    stored: dict[bool, int] = {}
    for packed in (False, True):
        models = [
            build_model(f"bench-{seed}@1", spec, seed, "bfloat16", packed=packed) for seed in (1, 2)
        ]
        stored[packed] = models[0].manifest.stored_bytes
        for throttle in (LINK_BYTES_PER_S, None):
            name = f"{'packed' if packed else 'plain'}, {'throttled' if throttle else 'free'}"
            seconds[name] = await _swaps(models, throttle, rounds)
        for built in models:
            built.segment.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    floor = stored[False] / LINK_BYTES_PER_S
    throttled, free = median["packed, throttled"], median["packed, free"]
    plain = median["plain, throttled"]
    figures = [
        Figure("bytes that cross the link", f"{stored[True] / stored[False]:.3f} of the plain"),
        Figure(
            "link throttled, plain image: to first token",
            f"{milliseconds(plain)} ({plain / floor:.2f} x bytes / rate)",
        ),
        Figure(
            "link throttled, packed image: to first token",
            f"{milliseconds(throttled)} ({throttled / plain:.2f} x plain, "
            f"{throttled / floor:.2f} x plain bytes / rate)",
            f"<= {SHARE_MAX:.2f} x plain bytes / rate",
            throttled <= SHARE_MAX * floor,
        ),
        Figure(
            "no throttle (a copy in memory), packed image",
            f"{milliseconds(free)} ({free / median['plain, free']:.1f} x plain)",
        ),
    ]
    return figures, {"first_token_s": seconds, "stored_bytes": list(stored.values())}


async def _swaps(models: list[BuiltModel], throttle: float | None, rounds: int) -> list[float]:
    arguments = [] if throttle is None else ["--link-bytes-per-s", f"{throttle}"]
    memory_bytes = models[0].manifest.weights_bytes + (128 << 20)
    found = []
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        worker = await BenchWorker.start(Path(directory), memory_bytes, *arguments)
        for built in models:
            await worker.attach(built)
        outgoing: str | None = None
        for number in range(WARM_SWAPS + rounds):
            incoming = models[number % 2]
            swap_s, result = await worker.swap(f"{number}", outgoing, incoming, PROMPT)
            if result.error:
                raise RuntimeError(result.error)
            outgoing = incoming.model
            if number >= WARM_SWAPS:
                found.append(swap_s)
        await worker.close()
    return found


def _seconds(run: Callable[[], object]) -> float:
    started = time.monotonic()
    run()
    return time.monotonic() - started


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status says whether its bounds were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["host", "cuda"], default="host")
    parser.add_argument("--model", choices=GPU_SHAPES, default="8B", help="with --device cuda")
    parser.add_argument("--fake", action="store_true", help="dry run over a fake driver")
    parser.add_argument("--output", type=Path)
    values: Any = parser.parse_args(arguments)
    if values.device == "cuda":
        measured = measure_packed_swaps(
            values.model, values.rounds, values.output, fake=values.fake
        )
        return 0 if asyncio.run(measured) else 1
    weights = normal_weights(PIECE_WEIGHTS)
    sizes, rates = measure_sizes(weights), measure_rates(weights, values.rounds)
    swaps = asyncio.run(measure_swaps(values.rounds))
    met = report(
        "packed images",
        [*sizes[0], *rates[0], *swaps[0]],
        parameters={
            "weights": len(weights),
            "link_bytes_per_s": LINK_BYTES_PER_S,
            "rounds": values.rounds,
            "vocabulary": VOCABULARY,
            "hidden": HIDDEN,
            "layers": LAYERS,
            "prompt_tokens": len(PROMPT),
            "dtype": "bfloat16",
        },
        measurements={"sizes": sizes[1], "rates": rates[1], "swaps": swaps[1]},
        output=values.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
