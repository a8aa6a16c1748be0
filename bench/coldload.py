"""How long a model takes from disk to STANDBY, held against plain reads of the same bytes.

    python -m bench.coldload [--rounds 7] [--directory DIR] [--output bench/results/coldload.json]

Writes a checkpoint of 1 GiB (bfloat16, two shards) and its cached image to DIR. In each round, with
the page cache dropped for the files that are read, and in a process of its own each: plain O_DIRECT
reads of the image's file, with as many threads and as large pieces as the cache's reader, into as
much memory and, as the disk's own limit, over and over into one small buffer a thread; the image
from the cache, and built from the checkpoint, each into spare memory and into new; safetensors' own
load; and runai-model-streamer, where it is installed. Plain reads go into memory that is present
and mapped, and spare memory is present too, so these differ only by what a load does beside
reading: it inspects the checkpoint, checks every tensor and seals. New memory is touched within the
time that is taken, as it is by safetensors and the streamer, which make their own. Each contender
times itself, so that starting Python is not counted; --streamer-python names an interpreter that
has the streamer, if this one has not. Ratios are medians of the rounds' ratios: a disk's rate may
change from one round to the next.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.results import Figure, report
from bench.worker import decoder
from engine.builder import inspect
from swap.build import build_image
from swap.cached_image import PIECE_BYTES, READ_THREADS, restore_image, save_image
from swap.direct_file import DirectFile, ReadBuffer
from swap.image import segment_bytes
from swap.presence import make_present
from swap.segment import Segment

VOCABULARY, HIDDEN, LAYERS = 65_536, 1024, 28
RATIO_MIN, STREAMER_RATIO_MAX = 0.9, 1.0
CONTENDER_TIMEOUT_S = 300.0
IMAGE_FILE = "kept.image"

STREAMER_CODE = """
import sys, time
from pathlib import Path
from runai_model_streamer import SafetensorsStreamer
files = [str(path) for path in sorted(Path(sys.argv[1]).glob("*.safetensors"))]
started = time.monotonic()
count = 0
with SafetensorsStreamer() as streamer:
    streamer.stream_files(files)
    for name, tensor in streamer.get_tensors():
        count += tensor.numel() * tensor.element_size()
print(time.monotonic() - started)
"""


def plain(directory: Path) -> float:
    """Read the image's file into a segment that is present and mapped, and nothing else."""
    with (
        DirectFile(directory / IMAGE_FILE, os.O_RDONLY) as file,
        Segment.create(file.size_bytes, "plain") as segment,
        segment.map_for_filling(huge_pages=True) as mapping,
    ):
        mapping.populate(0, file.size_bytes)

        def read(start: int, end: int) -> None:
            file.read(mapping.view(start, end - start), start)

        return timed_reads(lambda: read, file.size_bytes)


def disk(directory: Path) -> float:
    """Read the image's file piece by piece into the same small buffers, and keep nothing."""
    with DirectFile(directory / IMAGE_FILE, os.O_RDONLY) as file:

        def reader() -> Callable[[int, int], object]:
            buffer = ReadBuffer(PIECE_BYTES)
            return lambda start, end: file.fetch(buffer, start, end)

        return timed_reads(reader, file.size_bytes)


def timed_reads(reader: Callable[[], Callable[[int, int], object]], size_bytes: int) -> float:
    """The seconds in which READ_THREADS threads, with a reader each, go through a file."""
    starts = iter(range(0, size_bytes, PIECE_BYTES))
    lock = threading.Lock()

    def work() -> None:
        read = reader()
        while True:
            with lock:
                start = next(starts, None)
            if start is None:
                return
            read(start, min(start + PIECE_BYTES, size_bytes))

    started = time.monotonic()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for future in [pool.submit(work) for _ in range(READ_THREADS)]:
            future.result()
    return time.monotonic() - started


def cache(directory: Path, *, spare: bool = False) -> float:
    """Inspect the checkpoint and read its image from the cache's file."""
    with empty_segment(directory, spare) as segment:
        started = time.monotonic()
        found = inspect(str(directory), "bfloat16")
        restore_image(directory / IMAGE_FILE, found.layout, segment)
        return time.monotonic() - started


def checkpoint(directory: Path, *, spare: bool = False) -> float:
    """Inspect the checkpoint and build its image."""
    with empty_segment(directory, spare) as segment:
        started = time.monotonic()
        found = inspect(str(directory), "bfloat16")
        build_image(found.checkpoint, found.recipes, found.layout, segment, threads=READ_THREADS)
        return time.monotonic() - started


def empty_segment(directory: Path, spare: bool) -> Segment:
    """A segment for the image, as hotbayd hands it to a builder."""
    size_bytes = (directory / IMAGE_FILE).stat().st_size
    segment = Segment.create(size_bytes, "coldload")
    if spare:
        never = threading.Event()
        make_present(segment, threads=READ_THREADS, huge_pages=True, cancelled=never)
    return segment


def safetensors(directory: Path) -> float:
    """Load the checkpoint's files with safetensors into torch tensors, and touch all of it."""
    from safetensors.torch import load_file

    started = time.monotonic()
    for path in sorted(directory.glob("*.safetensors")):
        for tensor in load_file(path).values():
            tensor.clone()  # load_file maps the file; only a copy has read it
    return time.monotonic() - started


CONTENDERS: dict[str, Callable[[Path], float]] = {
    "disk": disk,
    "plain": plain,
    "cache": functools.partial(cache, spare=True),
    "cache_new": cache,
    "checkpoint": functools.partial(checkpoint, spare=True),
    "checkpoint_new": checkpoint,
    "safetensors": safetensors,
}


def main() -> int:
    """Measure, or with --contender be one of those who are measured."""
    parser = argparse.ArgumentParser(prog="bench.coldload", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--streamer-python", default=sys.executable)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(CONTENDERS[options.contender](options.directory))
        return 0
    with tempfile.TemporaryDirectory(prefix="hotbay-coldload-", dir=options.directory) as name:
        return 0 if measure(Path(name), options) else 1


def measure(directory: Path, options: argparse.Namespace) -> bool:
    """Run all contenders in turn, `rounds` times; returns whether every bound was met."""
    checkpoint_bytes, image_bytes = prepare(directory)
    commands = {
        name: [sys.executable, "-m", "bench.coldload", "--contender", name, "--directory"]
        for name in CONTENDERS
    }
    if has_streamer(options.streamer_python):
        commands["streamer"] = [options.streamer_python, "-c", STREAMER_CODE]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(options.rounds):
        # Each round in another order, so that nobody always runs after the same one.
        order = list(commands)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            drop_from_page_cache(directory)
            seconds[name].append(run([*commands[name], str(directory)]))
    return report(
        "cold load from disk to STANDBY",
        figures(seconds, image_bytes, checkpoint_bytes),
        parameters={
            "rounds": options.rounds,
            "image_bytes": image_bytes,
            "checkpoint_bytes": checkpoint_bytes,
            "threads": READ_THREADS,
            "piece_bytes": PIECE_BYTES,
            "vocabulary": VOCABULARY,
            "hidden": HIDDEN,
            "layers": LAYERS,
            "dtype": "bfloat16",
        },
        measurements={f"{name}_s": values for name, values in seconds.items()},
        output=options.output,
    )


def figures(seconds: dict[str, list[float]], image_bytes: int, file_bytes: int) -> list[Figure]:
    """Medians, and the ratios, of which those that have bounds are for a load into spare memory."""
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def ratio(name: str, other: str) -> float:
        pairs = zip(seconds[name], seconds[other], strict=True)
        return statistics.median(one / two for one, two in pairs)

    def rate(name: str, size_bytes: int) -> str:
        return f"{median[name] * 1000:.0f} ms, {size_bytes / median[name] / 1e9:.2f} GB/s"

    lines = [
        Figure("O_DIRECT reads of the image's file into one buffer", rate("disk", image_bytes)),
        Figure("plain O_DIRECT reads of the image's file", rate("plain", image_bytes)),
    ]
    for name, label, bounded in (
        ("cache", "from the image cache into spare memory", True),
        ("cache_new", "from the image cache into new memory", False),
        ("checkpoint", "from safetensors into spare memory", False),
        ("checkpoint_new", "from safetensors into new memory", False),
    ):
        reached, of_disk = ratio("plain", name), ratio("disk", name)
        lines.append(
            Figure(
                label,
                f"{rate(name, image_bytes)} ({reached:.2f} x plain reads, "
                f"{of_disk:.2f} x those into one buffer)",
                f">= {RATIO_MIN:g} x plain reads" if bounded else "",
                reached >= RATIO_MIN if bounded else None,
            )
        )
    lines.append(Figure("safetensors.torch.load_file and a copy", rate("safetensors", file_bytes)))
    if "streamer" in median:
        lines.append(Figure("runai-model-streamer to host tensors", rate("streamer", file_bytes)))
        for name, label, bounded in (
            ("cache", "from the image cache into spare memory, of the streamer's time", True),
            ("checkpoint", "from safetensors into spare memory, of the streamer's time", False),
            ("cache_new", "from the image cache into new memory, of the streamer's time", False),
            ("checkpoint_new", "from safetensors into new memory, of the streamer's time", False),
        ):
            share = ratio(name, "streamer")
            lines.append(
                Figure(
                    label,
                    f"{share:.2f} x",
                    f"<= {STREAMER_RATIO_MAX:g} x" if bounded else "",
                    share <= STREAMER_RATIO_MAX if bounded else None,
                )
            )
    return lines


def prepare(directory: Path) -> tuple[int, int]:
    """Write the checkpoint, of random weights, and its cached image; returns the bytes of both."""
    import torch
    from safetensors.torch import save_file

    spec = decoder(VOCABULARY, HIDDEN, LAYERS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": spec.context_tokens,
        "rms_norm_eps": spec.norm_epsilon,
        "tie_word_embeddings": spec.tied,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(16 << 20, generator=generator).to(torch.bfloat16)

    def draw(*shape: int) -> torch.Tensor:
        count = 1
        for dimension in shape:
            count *= dimension
        return block.repeat(-(-count // block.numel()))[:count].reshape(shape).clone()

    hidden, middle = spec.hidden, spec.intermediate
    heads, pairs = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    shards[0]["model.embed_tokens.weight"] = draw(spec.vocabulary, hidden)
    for layer in range(spec.layers):
        tensors = shards[2 * layer // spec.layers]
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("input_layernorm", (hidden,)),
            ("self_attn.q_proj", (heads, hidden)),
            ("self_attn.k_proj", (pairs, hidden)),
            ("self_attn.v_proj", (pairs, hidden)),
            ("self_attn.o_proj", (hidden, heads)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.gate_proj", (middle, hidden)),
            ("mlp.up_proj", (middle, hidden)),
            ("mlp.down_proj", (hidden, middle)),
        ):
            tensors[f"{prefix}{name}.weight"] = draw(*shape)
    shards[1]["model.norm.weight"] = draw(hidden)
    shards[1]["lm_head.weight"] = draw(spec.vocabulary, hidden)
    placed: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / name)
        placed |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    found = inspect(str(directory), "bfloat16")
    with Segment.create(segment_bytes(found.layout), "prepare") as segment:
        build_image(found.checkpoint, found.recipes, found.layout, segment)
        save_image(segment, directory / IMAGE_FILE)
        return found.checkpoint.size_bytes, segment.size_bytes


def drop_from_page_cache(directory: Path) -> None:
    """Have the next reader read from the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # what is dirty cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def has_streamer(python: str) -> bool:
    """Whether runai-model-streamer can be imported there; it is no dependency of the project."""
    command = [python, "-c", "import runai_model_streamer"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(command: list[str]) -> float:
    """The seconds that a contender took, by its own clock."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=CONTENDER_TIMEOUT_S
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
