"""Packed images on CUDA memory: the tokens of plain ones, swap after swap, and damage found.

Each test runs on the GPU where there is one, with the kernel that unpacks there, and everywhere
over a fake driver, whose memory the processor unpacks in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.shapes import write_random
from engine.device_tensors import bytes_at
from engine.link.control import EngineSpec, EngineStatus
from engine.parking import KvLane
from engine.unpackers import open_unpacker, prepare_unpacking
from engine.worker.images import Image
from engine.worker.resident import Resident
from engine.worker.verify import verify_weights
from swap.arena import PagePool, Region
from swap.errors import CorruptWeights
from swap.image import TensorRecipe, plan_image
from swap.packed_transfer import PackedTransfer
from swap.parking import ParkingArea
from swap.pieces import device_bytes, place_pieces
from swap.segment import Segment
from swap.writing import write_all
from tests.engine.checkpoints import make_checkpoint
from tests.gpu.test_engine_on_cuda import answers, swap_in
from tests.support.devices import FAKE, KEPT, NEEDS_GPU, device_factory, read
from tests.support.worker_stage import build_segment

PIECE = 8192
SWAPS = 6


@pytest.fixture(params=[FAKE, KEPT, pytest.param("cuda", marks=NEEDS_GPU)])
def pool(request: pytest.FixtureRequest) -> Iterator[PagePool]:
    with device_factory(request.param) as make:
        yield PagePool(make(24))


def test_packed_and_plain_models_take_turns_with_the_same_tokens(
    pool: PagePool, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "llama", 5)
    residents, images = [], []
    for name, piece_weights in (("plain", 0), ("packed", PIECE)):
        built = build_segment(tmp_path, "bfloat16", piece_weights)
        image = Image.attach(pool.device, os.dup(built.segment.descriptor), built.digest)
        spec = EngineSpec(f"{name}@1", built.digest, 256, 8, 64)
        lane = partial(KvLane, pool.device, ParkingArea(0))
        residents.append(Resident(spec, image, pool, 64, lane, lambda pages: None))
        images.append(image)
        built.segment.close()
    assert images[1].manifest.stored_bytes < 0.8 * images[0].manifest.stored_bytes
    found = []
    for number in range(SWAPS):
        incoming = residents[number % 2]
        swap_in(incoming, str(number))  # verifies a sample
        found.append(answers(incoming, number * 100))
        incoming.move(EngineStatus.DRAINING)
        incoming.move(EngineStatus.STAGED)
        incoming.evict()
    assert found == [found[0]] * SWAPS
    for resident, image in zip(residents, images, strict=True):
        resident.close()
        image.close()
    assert pool.free_pages == pool.total_pages


def test_every_weight_arrives_and_altered_codes_end_the_transfer(pool: PagePool) -> None:
    recipes = [TensorRecipe(f"t{layer}", layer, ("",), (700, 512)) for layer in range(4)]
    layout = plan_image(recipes, "bfloat16", {}, piece_weights=1 << 16)
    sound = [write_random("packed", one, 1) for one in (layout, plan_image(recipes, "bfloat16"))]
    manifest, plain = sound[0].manifest, sound[1].manifest
    prepare_unpacking(pool.device.kind)
    region = Region(pool, "weights", device_bytes(manifest))
    region.grow(region.pages_max)
    piece = place_pieces(manifest)[3]
    with Segment.create(sound[0].segment.size_bytes, "altered") as altered:
        content = os.pread(sound[0].segment.descriptor, altered.size_bytes, 0)
        at = piece.stored_offset_bytes + piece.stored_bytes * 4 // 5  # among its codes
        write_all(altered.descriptor, content[:at] + bytes([255] * 64) + content[at + 64 :], 0)
        for segment in (altered, sound[0].segment):
            unpacker = open_unpacker(pool.device.kind, region.address, device_bytes(manifest))
            with segment.map() as source:
                transfer = PackedTransfer(pool.device, manifest, source, region, unpacker)
                transfer.start()
                if segment is altered:
                    with pytest.raises(CorruptWeights, match="damaged"):
                        transfer.join()
                    continue
                for span in manifest.layers:
                    transfer.gate.wait(span.layer, 60)
                    there = read(pool.device, region.address + span.offset_bytes, span.bytes)
                    stored = os.pread(sound[1].segment.descriptor, span.bytes, span.offset_bytes)
                    tensor = plain.tensors[span.layer]
                    assert there[: tensor.size_bytes] == stored[: tensor.size_bytes]
                transfer.join()
                image = Image(pool.device, manifest, source)
                verify_weights(pool.device, image, region.address, "")
                wrong = bytes_at(pool.device.kind, region.address, manifest.weights_bytes)
                for entry in manifest.tensors:  # some of them are in any sample
                    wrong[entry.offset_bytes + 100] ^= 1
                with pytest.raises(CorruptWeights, match=r"does not match|differ"):
                    verify_weights(pool.device, image, region.address, "")
                del wrong
            del transfer, unpacker
    region.release()
    for one in sound:
        one.segment.close()
