"""Unpacking on the device, held to the numpy reference to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.shapes import write_random
from engine.device_tensors import bytes_at
from engine.kernels.triton import unpack
from engine.kernels.triton.unpack import TritonUnpacker
from engine.unpackers import sample_weights, try_unpacking
from engine.worker.images import Image
from engine.worker.verify import verify_weights
from swap.arena import PagePool, Region
from swap.checksum import checksum_of
from swap.errors import CorruptWeights, DeviceError
from swap.image import TensorRecipe, plan_image
from swap.packed_transfer import PackedTransfer
from swap.packing import BLOCK_WEIGHTS, pack, read_piece
from swap.pieces import device_bytes
from tests.support.devices import FAKE, device_factory


def weights_of(kind, count):
    draw = np.random.default_rng(3)
    rest = draw.integers(0, 1 << 16, count, np.uint16) & 0x807F
    exponents = {
        "normal": lambda: (
            (draw.standard_normal(count, dtype=np.float32).view(np.uint32) >> 23) & 0xFF
        ),
        "fifteen and rare": lambda: np.where(
            draw.random(count) < 0.05, draw.integers(0, 256, count), np.arange(count) % 15 + 100
        ),
        "zeros": lambda: np.zeros(count),
        "NaN and infinity": lambda: np.where(np.arange(count) % 911, 130, 255),
    }[kind]()
    return rest | (exponents.astype(np.uint16) << np.uint16(7))


def place(*parts):
    """Memory with arrays one after the other, as torch has it, and where each starts."""
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-part.nbytes // 256) * 256
    memory = torch.zeros(end, dtype=torch.uint8)
    for start, part in zip(starts, parts, strict=True):
        memory[start : start + part.nbytes] = torch.from_numpy(part.view(np.uint8))
    return memory, starts


@pytest.mark.parametrize("kind", ["normal", "fifteen and rare", "zeros", "NaN and infinity"])
def test_the_kernel_gives_the_same_bits(kind):
    bits = set()
    for count in (BLOCK_WEIGHTS - 1, BLOCK_WEIGHTS, 4 * BLOCK_WEIGHTS - 17):
        weights = weights_of(kind, count)
        packed = pack(weights)
        piece = read_piece(packed, count)
        bits.add(piece.code_bits)
        beyond = np.full(count + 64, 0xBEEF, np.uint16)
        memory, (source, target, raw) = place(packed, beyond, weights)
        unpacker = TritonUnpacker(memory, 5 << 20)
        unpacker.wait(unpacker.unpack(piece, (5 << 20) + source, (5 << 20) + target))
        unpacker.check()
        out = memory.numpy()[target : target + beyond.nbytes].view(np.uint16)
        assert np.array_equal(out[:count], weights)
        assert set(out[count:]) == {0xBEEF}
        out[:] = 0
        unpacker.wait(unpacker.move((5 << 20) + raw, (5 << 20) + target, weights.nbytes))
        assert np.array_equal(out[:count], weights)
    assert bits == ({4} if kind == "fifteen and rare" else {3})


def test_what_arrived_damaged_is_found_and_nothing_is_read_outside():
    """The bytes on the device differ from the host's copy, which was checked."""
    weights = weights_of("normal", 2 * BLOCK_WEIGHTS)
    packed = pack(weights)
    piece = read_piece(packed, len(weights))
    offsets_at, _, codes_at, exceptions_at = piece.part_offsets_bytes
    for damaged, value in ((codes_at, None), (offsets_at + 7, 0x7F), (offsets_at + 3, 0xFF)):
        arrived = packed.copy()
        if value is None:
            arrived[codes_at:exceptions_at] = 0xFF  # escapes everywhere
        else:
            arrived[damaged] = value
        memory, (source, target, sound) = place(arrived, np.zeros_like(weights), packed)
        unpacker = TritonUnpacker(memory, 0)
        unpacker.unpack(piece, source, target)
        unpacker.unpack(piece, sound, target)  # a sound one behind it does not hide it
        with pytest.raises(CorruptWeights):
            unpacker.check()


def test_the_trial_before_the_first_packed_image_finds_a_kernel_that_is_wrong(monkeypatch):
    for bits in (3, 4):
        weights = sample_weights(bits)
        assert read_piece(pack(weights), len(weights)).code_bits == bits
    try_unpacking(torch.device("cpu"))
    monkeypatch.setattr(unpack, "TABLE_OFFSET_BYTES", 17)
    with pytest.raises(DeviceError, match=r"other weights.*host_store\.packed"):
        try_unpacking(torch.device("cpu"))


def test_an_image_is_unpacked_by_the_kernel_behind_its_copy(packed_image):
    """Over a fake driver, whose memory is the host's: copies end when their events say so."""
    manifest, segment = packed_image
    with device_factory(FAKE) as make, segment.map() as source:
        pool = PagePool(make(4))
        region = Region(pool, "weights", device_bytes(manifest))
        region.grow(region.pages_max)
        memory = bytes_at("host", region.address, device_bytes(manifest))
        unpacker = TritonUnpacker(memory, region.address)
        transfer = PackedTransfer(pool.device, manifest, source, region, unpacker)
        transfer.start()
        for entry in manifest.tensors:
            transfer.gate.wait(entry.layer, 60)
            landed = memory[entry.offset_bytes : entry.offset_bytes + entry.size_bytes].numpy()
            assert checksum_of(landed.data) == entry.checksum
        transfer.join()
        assert transfer.bytes_total == manifest.stored_bytes < 0.75 * manifest.weights_bytes
        image = Image(pool.device, manifest, source)
        verify_weights(pool.device, image, region.address, "any")
        memory[manifest.tensors[0].offset_bytes + 9] ^= 1
        with pytest.raises(CorruptWeights):
            verify_weights(pool.device, image, region.address, "any")
        del memory, unpacker, transfer
        region.release()


@pytest.fixture
def packed_image():
    """Two layers of a few pieces each, and one that is not worth packing."""
    recipes = [
        TensorRecipe("embedding", -1, ("e",), (40, 512)),
        TensorRecipe("a", 0, ("a",), (100, 256)),
        TensorRecipe("norm", 0, ("n",), (33,)),
        TensorRecipe("b", 1, ("b",), (64, 256)),
    ]
    layout = plan_image(recipes, "bfloat16", {}, piece_weights=2 * BLOCK_WEIGHTS)
    built = write_random("kernel", layout, 1)
    yield built.manifest, built.segment
    built.segment.close()
