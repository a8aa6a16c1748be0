"""Packed images on a real worker: the same tokens, fewer bytes, and damage that never answers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.link import control
from engine.link.control import EngineStatus, Stage
from engine.worker.images import Image
from engine.worker.verify import verify_host
from swap.errors import CorruptWeights, DeviceError
from swap.host_device import HostDevice
from swap.image import Manifest, complete
from swap.pieces import PlacedPiece, place_pieces, read_placed
from swap.segment import Segment
from swap.writing import write_all, write_manifest
from tests.support.descriptors import open_descriptors
from tests.support.worker_stage import (
    BuiltImage,
    build_segment,
    greedy,
    load,
    worker_process,
)
from tests.worker.conftest import Model, serving

PROMPTS = ([5, 9, 101, 44, 7], [3, 3, 8], list(range(1, 60)))
PIECE = 8192


@pytest.fixture(scope="module")
def images(prose: Model, code: Model) -> dict[str, tuple[BuiltImage, BuiltImage]]:
    """By model its bfloat16 image, plain and packed in several pieces a tensor."""
    found = {}
    for model in (prose, code):
        directory = Path(model.checkpoint.directory)
        plain = build_segment(directory, "bfloat16")
        packed = build_segment(directory, "bfloat16", PIECE)
        assert packed.segment.size_bytes < plain.segment.size_bytes
        assert any(piece.packed for piece in place_pieces(packed.manifest))
        found[model.key] = (plain, packed)
    return found


def test_packed_models_take_turns_and_answer_as_plain_ones_do(
    runtime_dir: Path, images: dict[str, tuple[BuiltImage, BuiltImage]]
) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            expected: dict[str, list[list[int]]] = {}
            outgoing: tuple[str, ...] = ()
            for turn in range(6):
                key = list(images)[turn % 2]
                image = images[key][turn >= 2]  # both plain first, then both packed, twice
                await hotbayd.attach(image)
                exchange = load(key, image, f"swap-{turn}", outgoing=outgoing)
                result = await hotbayd.exchange(exchange)
                assert (result.error, result.rolled_back) == ("", False)
                assert result.ledger.copied_bytes == image.manifest.stored_bytes
                answers = [await gateway.run(key, prompt, greedy(16)) for prompt in PROMPTS]
                tokens = [answer.tokens for answer in answers]
                assert expected.setdefault(key, tokens) == tokens
                outgoing = (key,)
            await worker.clear()

    asyncio.run(run())


def test_packed_weights_are_staged(
    runtime_dir: Path, images: dict[str, tuple[BuiltImage, BuiltImage]]
) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            key, other = images
            (_, image), (_, there) = images[key], images[other]
            for each in (image, there):
                await hotbayd.attach(each)
            assert (await hotbayd.exchange(load(key, image))).error == ""
            expected = (await gateway.run(key, [5, 9, 101], greedy(12))).tokens
            assert (await hotbayd.exchange(load(other, there, "away", outgoing=(key,)))).error == ""
            spec = load(key, image).incoming
            assert spec is not None
            reply = await hotbayd.call(control.StageWeights("all", spec))
            assert reply.result.ledger.copied_bytes == image.manifest.stored_bytes
            back = await hotbayd.exchange(load(key, image, "back", outgoing=(other,)))
            assert (back.error, back.ledger.copied_bytes) == ("", 0)
            assert (await gateway.run(key, [5, 9, 101], greedy(12))).tokens == expected

    asyncio.run(run())


def test_a_swap_to_a_packed_model_that_is_abandoned_brings_the_packed_one_back(
    runtime_dir: Path, prose: Model, code: Model, images: dict[str, tuple[BuiltImage, BuiltImage]]
) -> None:
    async def run() -> None:
        old, new = images[prose.key][1], images[code.key][1]
        rate = new.manifest.stored_bytes / 0.5
        async with worker_process(runtime_dir, "--link-bytes-per-s", f"{rate}") as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            await hotbayd.attach(old)
            await hotbayd.attach(new)
            assert (await hotbayd.exchange(load(prose.key, old))).error == ""
            before = await gateway.run(prose.key, PROMPTS[0], greedy(16))
            exchange = load(code.key, new, "swap", outgoing=(prose.key,))
            swapping = asyncio.create_task(hotbayd.exchange(exchange))
            await hotbayd.stage("swap", Stage.COPYING)
            await hotbayd.done(control.Abandon("swap"))
            result = await swapping
            assert result.rolled_back
            after = await gateway.run(prose.key, PROMPTS[0], greedy(16))
            assert after.tokens == before.tokens
            # The link carries what is stored, and the ledger says so.
            again = load(code.key, new, "again", outgoing=(prose.key,))
            ledger = (await hotbayd.exchange(again)).ledger
            assert ledger.copied_bytes == new.manifest.stored_bytes
            assert ledger.copy_ms >= 500
            await worker.clear()

    asyncio.run(run())


def altered(
    image: BuiltImage,
    change: Callable[[bytearray, PlacedPiece], None] | None,
    checksum: str | None = None,
) -> BuiltImage:
    """A copy of a packed image with its largest packed piece, or a checksum, changed."""
    content = bytearray(os.pread(image.segment.descriptor, image.segment.size_bytes, 0))
    pieces = [piece for piece in place_pieces(image.manifest) if piece.packed]
    if change is not None:
        change(content, max(pieces, key=lambda piece: piece.stored_bytes))
    checksums = {entry.name: checksum or entry.checksum for entry in image.manifest.tensors}
    manifest = complete(image.manifest, checksums)
    segment = Segment.create(image.segment.size_bytes, "altered")
    write_all(segment.descriptor, bytes(content), 0)
    write_manifest(segment.descriptor, manifest)
    segment.seal()
    return BuiltImage(segment, manifest)


def spoil_header(content: bytearray, piece: PlacedPiece) -> None:
    content[piece.stored_offset_bytes + 4] = 7


def spoil_codes(content: bytearray, piece: PlacedPiece) -> None:
    """Escapes everywhere, for which there are no exceptions."""
    with Segment.create(len(content), "read") as segment:
        write_all(segment.descriptor, bytes(content), 0)
        with segment.map() as mapping:
            _, _, codes, exceptions = read_placed(mapping, piece).part_offsets_bytes
    start = piece.stored_offset_bytes
    content[start + codes : start + exceptions] = b"\xff" * (exceptions - codes)


@pytest.mark.parametrize("what", ["codes", "checksums"])
def test_packed_weights_that_are_damaged_never_answer(
    runtime_dir: Path,
    prose: Model,
    code: Model,
    images: dict[str, tuple[BuiltImage, BuiltImage]],
    what: str,
) -> None:
    async def run() -> None:
        image = images[code.key][1]
        wrong = altered(image, None, "1" * 32)
        if what == "codes":
            wrong = altered(image, spoil_codes)
        async with (
            worker_process(runtime_dir) as worker,
            serving(worker, prose, code) as (hotbayd, gateway),
        ):
            await hotbayd.attach(wrong)
            exchange = load(code.key, wrong, "swap", outgoing=(prose.key,))
            result = await hotbayd.exchange(exchange)
            assert (result.error_reason, result.rolled_back) == ("CORRUPT_WEIGHTS", True)
            answer = await gateway.run(prose.key, PROMPTS[0], greedy(8))
            assert answer.tokens == prose.expected(PROMPTS[0], 8)
            state = await hotbayd.describe()
            status = {one.model: one.status for one in state.engines}
            assert status[prose.key] is EngineStatus.ACTIVE

    asyncio.run(run())


def test_a_damaged_piece_is_found_when_the_image_is_attached(
    runtime_dir: Path, code: Model, images: dict[str, tuple[BuiltImage, BuiltImage]]
) -> None:
    async def run() -> None:
        wrong = altered(images[code.key][1], spoil_header)
        async with worker_process(runtime_dir) as worker:
            hotbayd = await worker.hotbayd()
            message = control.AttachImage(wrong.digest)
            refused = await hotbayd.failed(message, (wrong.segment.descriptor,))
            assert refused.reason == "CORRUPT_WEIGHTS"
            assert "packed weights is damaged" in refused.message
            assert (await hotbayd.describe()).images == ()

    asyncio.run(run())


def test_all_of_the_host_copy_is_checked_by_one_look_at_where_its_pieces_lie(
    code: Model, images: dict[str, tuple[BuiltImage, BuiltImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, looks = images[code.key][1], []

    def look(manifest: Manifest) -> tuple[PlacedPiece, ...]:
        looks.append(manifest.digest)
        return place_pieces(manifest)

    device = HostDevice(2 << 20)
    image = Image.attach(device, os.dup(packed.segment.descriptor), packed.digest)
    monkeypatch.setattr("swap.pieces.place_pieces", look)
    assert verify_host(image, threading.Event())
    assert looks == [packed.digest]
    image.close()
    wrong = altered(packed, None, "1" * 32)
    image = Image.attach(device, os.dup(wrong.segment.descriptor), wrong.digest)
    with pytest.raises(CorruptWeights, match="does not match its checksum"):
        verify_host(image, threading.Event())
    image.close()
    device.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU unpacks")
def test_a_device_on_which_nothing_unpacks_refuses_packed_images(
    code: Model, images: dict[str, tuple[BuiltImage, BuiltImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = images[code.key]
    device = HostDevice(2 << 20)
    monkeypatch.setattr(device, "kind", "cuda")
    before = len(open_descriptors())
    with pytest.raises(DeviceError, match=r"unpacked on cuda: .*host_store\.packed = false"):
        Image.attach(device, os.dup(packed.segment.descriptor), packed.digest)
    Image.attach(device, os.dup(plain.segment.descriptor), plain.digest).close()
    assert len(open_descriptors()) == before
    device.close()
