"""What swaps rely on of a GPU: graphs over stable addresses, and order between copies and kernels.

Each test runs on the GPU where there is one, and everywhere over a fake driver, whose memory the
processor computes on. There a graph is a call with the tensors it was captured with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.shapes import write_random
from bench.worker import BuiltModel
from engine.device_tensors import bytes_at
from swap.arena import PagePool, Region
from swap.image import TensorRecipe, plan_image
from swap.transfer import Transfer
from tests.support.devices import FAKE, KEPT, NEEDS_GPU, device_factory

PAGE = 2 << 20
SIDE = 1024
LAYERS = 3
SWAPS = 20
SLEEP_CYCLES = 200_000_000
"""A tenth of a second and more on any GPU."""


@pytest.fixture(params=[FAKE, KEPT, pytest.param("cuda", marks=NEEDS_GPU)])
def pool(request: pytest.FixtureRequest) -> Iterator[PagePool]:
    with device_factory(request.param) as make:
        yield PagePool(make(16))


def on_gpu(pool: PagePool) -> bool:
    return pool.device.kind == "cuda"


def torch_device(pool: PagePool) -> torch.device:
    return torch.device("cuda" if on_gpu(pool) else "cpu")


def image(seed: int) -> BuiltModel:
    """LAYERS square matrices of 2 pages each."""
    recipes = [
        TensorRecipe(f"layer {layer}", layer, (f"{layer}",), (SIDE, SIDE))
        for layer in range(LAYERS)
    ]
    built = write_random(f"square-{seed}@1", plan_image(recipes, "float32"), seed)
    assert [span.bytes for span in built.manifest.layers] == [2 * PAGE] * LAYERS
    return built


def matrices(kind: Any, address: int, built: BuiltModel) -> list[torch.Tensor]:
    whole = bytes_at(kind, address, built.manifest.weights_bytes)
    return [
        whole[one.offset_bytes : one.offset_bytes + one.size_bytes]
        .view(torch.float32)
        .view(one.shape)
        for one in built.manifest.tensors
    ]


def through(rows: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    for weight in weights:
        rows = torch.tanh(rows @ weight)
    return rows


def captured(pool: PagePool, work: Callable[[], Any]) -> Callable[[], Any]:
    """What replays `work` on the memory that it was captured with."""
    if not on_gpu(pool):
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what work needs once is made outside the graph
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.inference_mode()
def test_a_captured_graph_gives_right_results_after_any_number_of_swaps(pool: PagePool) -> None:
    images = [image(1), image(2)]
    region = Region(pool, "weights", images[0].manifest.weights_bytes)
    region.grow(region.pages_max)
    rows = torch.randn(4, SIDE, generator=torch.Generator().manual_seed(3))
    sources = [built.segment.map() for built in images]
    wanted = [
        through(rows, matrices("host", source.address, built))
        for source, built in zip(sources, images, strict=True)
    ]
    assert not torch.allclose(*wanted)
    weights = matrices(pool.device.kind, region.address, images[0])
    given = rows.to(torch_device(pool))
    found = torch.zeros_like(given)
    replay = captured(pool, lambda: found.copy_(through(given, weights)))
    pages: set[tuple[int, ...]] = set()
    for number in range(SWAPS):
        # Each time other pages come to lie at the addresses that the graph was captured with.
        region.shrink(region.mapped_pages)
        shift = pool.take("something else", 1 + number % 5)
        region.grow(region.pages_max)
        pages.add(region.pages)
        which = number % 2
        transfer = Transfer(pool.device, images[which].manifest, sources[which], region)
        transfer.start()
        transfer.join()
        found.zero_()
        replay()
        torch.testing.assert_close(found.cpu(), wanted[which], rtol=1e-3, atol=1e-3)
        pool.give_back("something else", shift)
    assert len(pages) > 1
    region.release()
    for source in sources:
        source.close()


def keep_busy(pool: PagePool) -> Callable[[], bool]:
    """Have something computed for a while; whether it has ended."""
    if on_gpu(pool):
        torch.cuda._sleep(SLEEP_CYCLES)
        event = torch.cuda.Event()
        event.record()
        return event.query
    running, ended = threading.Event(), threading.Event()
    device: Any = pool.device
    device._driver.launch(lambda: (running.wait(20), ended.set()))
    threading.Timer(0.05, running.set).start()
    return ended.is_set


def test_unmapping_waits_for_what_is_computed_there(pool: PagePool) -> None:
    region = Region(pool, "weights", 2 * PAGE)
    region.grow(2)
    numbers = bytes_at(pool.device.kind, region.address, 2 * PAGE).view(torch.float32)
    numbers.fill_(1.0)
    has_ended = keep_busy(pool)
    assert not has_ended()
    total = numbers.sum() if on_gpu(pool) else None  # on the GPU it is issued, and reads later
    region.shrink(2)
    assert has_ended()
    if total is not None:
        assert total.item() == numbers.numel()
    region.release()


@torch.inference_mode()
def test_a_layer_is_computed_with_before_the_next_has_arrived(pool: PagePool) -> None:
    built = image(1)
    region = Region(pool, "weights", built.manifest.weights_bytes)
    region.grow(2)
    rows = torch.randn(4, SIDE, generator=torch.Generator().manual_seed(3))
    computed = rows.to(torch_device(pool))
    with built.segment.map() as source:
        wanted = matrices("host", source.address, built)
        # The others cannot arrive yet: there is no page for them.
        transfer = Transfer(pool.device, built.manifest, source, region, growing=True)
        weights = matrices(pool.device.kind, region.address, built)
        transfer.start()
        for layer in range(LAYERS):
            transfer.gate.wait(layer, 20)
            assert transfer.gate.landed_layers == layer + 1
            computed = through(computed, [weights[layer]])
            expected = through(rows, wanted[: layer + 1])
            torch.testing.assert_close(computed.cpu(), expected, rtol=1e-3, atol=1e-3)
            assert transfer.bytes_done == (layer + 1) * 2 * PAGE
            if layer + 1 < LAYERS:
                region.grow(2)
                transfer.backed(region.mapped_bytes)
        transfer.join()
        del wanted
    region.release()
