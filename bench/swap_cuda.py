"""How long a swap takes on a GPU, held against the image's bytes at the measured rate of the link.

Alternates two models of random bf16 weights in real shapes on one worker, and measures from the
sending of the exchange to the arrival of the incoming model's first token for a prompt of 64. The
rate is that of pinned copies, taken before and after by the same calls that the worker copies with.
In the first rounds the same weights are brought in by four other ways too (`bench.peers`). The
bench plays hotbayd and the gateway; the worker is the real one. Models of 30B are one image under
two names: two would not fit the host, and no figure can tell. Images in fp8 are not served yet:
`bench.transfer_cuda` measures how long one takes to arrive. A dry run does all of it in small sizes
over a fake driver.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

from bench.fake_worker import ReadableCuda
from bench.peers import Peers
from bench.results import Figure, report
from bench.shapes import GPU_SHAPES, fp8_layout, gpu_shape, large_model, same_image, write_random
from bench.transfer_cuda import measure_transfers
from bench.worker import BenchWorker, BuiltModel
from engine.models.spec import ModelSpec
from swap.arena import PagePool
from swap.cuda_device import PAGE_BYTES, CudaDevice
from swap.device import DeviceMemory
from swap.fake_driver import FakeDriver
from swap.transfer import measure_link

FP8 = "8B-fp8"
MODELS = (*GPU_SHAPES, FP8)
PROMPT = tuple(range(1, 65))
LIMITS = (512, 8, 64)
"""Tokens of context, requests that may run, and that may wait."""
RATIO_MAX = 1.05
OVERHEAD_S = {"1B": 0.015, "8B": 0.015, "30B": 0.030}
EVICT_MS_MAX = 10.0
STANDBY_BYTES_MAX = 64_000_000
WARM_SWAPS = 4
PRESENT_TIMEOUT_S = 120.0
PEER_ROUNDS = 3
LINK_BYTES = 1 << 30
WORKSPACE_BYTES = 3 << 30
KV_BYTES = 1 << 30
MIB = 1 << 20
PHASES = ("drain_ms", "evict_ms", "copy_ms", "verify_ms", "total_ms")


@dataclass(frozen=True)
class Setting:
    """Where swaps are measured, and in which sizes. Bytes."""

    fake: bool
    page_bytes: int
    workspace_bytes: int
    kv_bytes: int
    link_bytes: int

    @classmethod
    def of(cls, fake: bool) -> Setting:
        if fake:
            return cls(True, 2 * MIB, 0, 32 * MIB, 8 * MIB)
        return cls(False, PAGE_BYTES, WORKSPACE_BYTES, KV_BYTES, LINK_BYTES)

    def memory_bytes(self, weights_bytes: int) -> int:
        """What a worker is given for one model at a time."""
        return weights_bytes + self.page_bytes + self.kv_bytes + self.workspace_bytes

    def shape(self, name: str) -> ModelSpec:
        return gpu_shape(name, tiny=self.fake)

    def device(self, memory_bytes: int) -> DeviceMemory:
        """Device memory in this process."""
        if self.fake:
            return ReadableCuda(memory_bytes, page_bytes=self.page_bytes, driver=FakeDriver())
        return CudaDevice(memory_bytes, page_bytes=self.page_bytes)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu" if self.fake else "cuda")

    async def start(self, directory: Path, memory_bytes: int, *options: str) -> BenchWorker:
        """A worker over the GPU, or over a fake driver."""
        options = ("--page-bytes", str(self.page_bytes), *options)
        if self.fake:
            program = "bench.fake_worker"
        else:
            program = "engine.worker.main"
            options += ("--device", "cuda", "--workspace-bytes", str(self.workspace_bytes))
        return await BenchWorker.start(directory, memory_bytes, *options, program=program)

    def used_bytes(self) -> int:
        """Memory of the GPU that is in use, by whomever; a dry run has none."""
        if self.fake:
            return 0
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return total_bytes - free_bytes

    async def until_used(self, used_bytes: int) -> None:
        """Until a worker has made its memory present. Raises RuntimeError."""
        deadline = time.monotonic() + PRESENT_TIMEOUT_S
        while not self.fake and self.used_bytes() < used_bytes:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{used_bytes} bytes of the GPU were not in use within a while")
            await asyncio.sleep(0.1)


@dataclass
class Found:
    """What was measured. Seconds and bytes."""

    rates: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    ledgers: list[dict[str, Any]] = field(default_factory=list)
    standby_bytes: int = 0
    peers: dict[str, list[float]] = field(default_factory=dict)
    peers_error: str = ""


def pinned_rate(device: DeviceMemory) -> float:
    """Bytes per second of one pinned copy of as much as the device has."""
    try:
        pool = PagePool(device)
        return measure_link(pool, pool.total_pages * pool.page_bytes)
    finally:
        device.close()


def note_host_memory(needed_bytes: int) -> None:
    """Say so when the host seems to have less; some give a guest more as it comes to need it."""
    available = psutil.virtual_memory().available
    if available < needed_bytes:
        print(f"{needed_bytes} bytes of host memory are needed, and {available} available so far")


def two_models(name: str, setting: Setting) -> list[BuiltModel]:
    """Two models of a shape, each with an image of its own unless that is too large."""
    spec = setting.shape(name)
    first = large_model(f"{name}-1@1", spec, 1, "bfloat16")
    if name == "30B":
        return [first, same_image(first, f"{name}-2@1")]
    return [first, large_model(f"{name}-2@1", spec, 2, "bfloat16")]


async def measure_gpu_swaps(name: str, rounds: int, output: Path | None, *, fake: bool) -> bool:
    """Alternate two models; returns whether the bounds were met. Raises RuntimeError."""
    setting = Setting.of(fake)
    if name == FP8:
        layout = fp8_layout(setting.shape("8B"))
        note_host_memory(layout.weights_bytes)
        device = setting.device(setting.memory_bytes(layout.weights_bytes))
        built = write_random(f"{name}@1", layout, 1)
        return measure_transfers(name, built, device, rounds, output)
    spec = setting.shape(name)
    # Two images, and a file of one; or one image.
    note_host_memory(2 * spec.parameters * (1 if name == "30B" else 3))
    models = two_models(name, setting)
    weights_bytes = models[0].manifest.weights_bytes
    memory_bytes = setting.memory_bytes(weights_bytes)
    found = Found()
    found.rates.append(pinned_rate(setting.device(setting.link_bytes)))
    pool_bytes = memory_bytes - setting.workspace_bytes
    present = setting.used_bytes() + pool_bytes // setting.page_bytes * setting.page_bytes
    with tempfile.TemporaryDirectory(prefix="hb") as directory:
        async with await setting.start(Path(directory), memory_bytes) as worker:
            await setting.until_used(present)
            await first_comes_alone(worker, models, setting, found)
            await alternate(worker, models, rounds, setting, found)
    found.rates.append(pinned_rate(setting.device(setting.link_bytes)))
    return report(
        f"swap on the GPU, {name} in bf16" + (" (dry run)" if fake else ""),
        figures_of(name, weights_bytes, found, fake=fake),
        parameters={
            "weights_bytes": weights_bytes,
            "memory_bytes": memory_bytes,
            "page_bytes": setting.page_bytes,
            "images": 1 if models[0].segment is models[1].segment else 2,
            "rounds": rounds,
            "prompt_tokens": len(PROMPT),
        },
        measurements=vars(found),
        output=output,
    )


async def first_comes_alone(
    worker: BenchWorker, models: list[BuiltModel], setting: Setting, found: Found
) -> None:
    """Bring the first model in, then swap to the second and back: what more the GPU holds then is
    what a model in STANDBY takes."""
    await worker.attach(models[0])
    await worker.exchange("first", None, models[0], LIMITS)
    await worker.answer(models[0].model, PROMPT)
    before = setting.used_bytes()
    await worker.attach(models[1])
    for number in range(WARM_SWAPS):
        incoming = models[1 - number % 2]
        await worker.exchange(f"warm {number}", models[number % 2].model, incoming, LIMITS)
        await worker.answer(incoming.model, PROMPT)
    found.standby_bytes = setting.used_bytes() - before


async def alternate(
    worker: BenchWorker, models: list[BuiltModel], rounds: int, setting: Setting, found: Found
) -> None:
    """Swap to and fro, and in the first rounds measure the other ways between."""
    expected: dict[str, int] = {}
    peers: Peers | None = None
    distinct = models[0].segment is not models[1].segment
    for number in range(rounds):
        outgoing, incoming = models[number % 2], models[1 - number % 2]
        swap_s, result = await worker.swap(
            f"{number}", outgoing.model, incoming, PROMPT, limits=LIMITS
        )
        token = await worker.answer(incoming.model, PROMPT)
        if result.error or expected.setdefault(incoming.model, token) != token:
            raise RuntimeError(f"swap {number}: {result.error or 'another token'}")
        found.first_token_s.append(swap_s)
        found.ledgers.append(msgspec.to_builtins(result.ledger))
        if number < PEER_ROUNDS and distinct and not found.peers_error:
            try:
                peers = peers or Peers(models[0], setting.torch_device)
                for way, seconds in peers.seconds().items():
                    found.peers.setdefault(way, []).append(seconds)
            except Exception as error:  # whatever a peer fails of, the swap's figures stand
                found.peers_error = f"{type(error).__name__}: {error}"
    if peers is not None:
        peers.close()


def figures_of(name: str, weights_bytes: int, found: Found, *, fake: bool) -> list[Figure]:
    """What is quoted. A dry run meets no bound: its times mean nothing."""
    rate = statistics.mean(found.rates)
    floor_s, swap_s = weights_bytes / rate, statistics.median(found.first_token_s)
    limit_s = RATIO_MAX * floor_s + OVERHEAD_S[name]
    evict_ms = statistics.median(one["evict_ms"] for one in found.ledgers)
    copied_out = sum(one["parked_bytes"] for one in found.ledgers)

    def met(bound: Callable[[], bool]) -> bool | None:
        return None if fake else bound()

    figures = [
        Figure("pinned copies, host to device", f"{rate / 1e9:.2f} GB/s"),
        Figure("the image's bytes at that rate", f"{floor_s * 1000:.1f} ms"),
        Figure(
            "exchange sent to first token",
            f"{swap_s * 1000:.1f} ms ({swap_s / floor_s:.2f} x the floor)",
            f"<= {RATIO_MAX:g} x the floor + {OVERHEAD_S[name] * 1000:.0f} ms = "
            f"{limit_s * 1000:.1f} ms",
            met(lambda: swap_s <= limit_s),
        ),
        Figure(
            "freeing the outgoing model's memory, mapping the incoming's included",
            f"{evict_ms:.2f} ms, {copied_out} bytes copied out",
            f"<= {EVICT_MS_MAX:g} ms, no byte copied out",
            met(lambda: evict_ms <= EVICT_MS_MAX and not copied_out),
        ),
        Figure(
            "device memory held by a model in STANDBY",
            f"{found.standby_bytes / 1e6:.1f} MB",
            f"<= {STANDBY_BYTES_MAX / 1e6:g} MB",
            met(lambda: found.standby_bytes <= STANDBY_BYTES_MAX),
        ),
        *(
            Figure(f"  {phase}", f"{statistics.median(one[phase] for one in found.ledgers):.1f} ms")
            for phase in PHASES
        ),
    ]
    for way, taken in found.peers.items():
        seconds = statistics.median(taken)
        figures.append(
            Figure(way, f"{seconds * 1000:.1f} ms, {seconds / swap_s:.2f} x ours to a token")
        )
    if found.peers_error:
        figures.append(Figure("the other ways", f"failed: {found.peers_error}", met=False))
    return figures
