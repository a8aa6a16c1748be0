"""Where pieces of packed images lie and go: nothing is overwritten before it was unpacked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swap.image import Manifest, TensorRecipe, complete, plan_image, segment_bytes
from swap.pieces import (
    arrival_offset_bytes,
    device_bytes,
    place_pieces,
    run_of,
    run_within,
    stored_bytes_behind,
    unpacking_bytes,
    whole_pieces_bytes,
)

BLOCK = 4096
items = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5 * BLOCK)), min_size=1, max_size=12)
draws = st.randoms(use_true_random=False)


def packed(items, choose) -> tuple[Manifest, Manifest]:
    """The layout of tensors, and a manifest of pieces that turned out at most as large."""
    recipes = [
        TensorRecipe(f"t{index}", layer, (), (count,)) for index, (layer, count) in enumerate(items)
    ]
    layout = plan_image(recipes, "bfloat16", {}, piece_weights=2 * BLOCK)
    stored = {
        entry.name: tuple(choose.randint(1, size) for size in entry.pieces)
        for entry in layout.tensors
    }
    checksums = {entry.name: entry.checksum for entry in layout.tensors}
    return layout, complete(layout, checksums, stored)


@given(items, draws)
def test_no_weights_reach_into_what_is_still_packed(items, choose):
    layout, manifest = packed(items, choose)
    base = arrival_offset_bytes(manifest)
    for piece in place_pieces(manifest):
        assert piece.offset_bytes + piece.weights_bytes <= base + piece.stored_offset_bytes
    assert manifest.weights_bytes <= device_bytes(manifest) <= device_bytes(layout)
    longest = max((piece.weights_bytes for piece in place_pieces(manifest)), default=0)
    padding = 4096 * (len(manifest.layers) + 2) + 256 * len(manifest.tensors)
    assert device_bytes(layout) <= manifest.weights_bytes + longest + padding
    assert segment_bytes(manifest) <= segment_bytes(layout)


@given(items, draws)
def test_any_run_of_pieces_can_be_unpacked_within_its_room(items, choose):
    _, manifest = packed(items, choose)
    pieces = place_pieces(manifest)
    there = choose.choice([0, *(piece.offset_bytes for piece in pieces)])
    wanted = choose.randint(0, manifest.weights_bytes)
    run = run_of(manifest, there, wanted)
    assert all(piece.offset_bytes < there for piece in pieces[: run.first])
    assert run.last == run.first or wanted <= manifest.weights_bytes
    for piece in pieces[run.first : run.last]:
        arrived = run.arrival_offset_bytes + piece.stored_offset_bytes
        assert max(there, piece.offset_bytes + piece.weights_bytes) <= arrived
        assert arrived + piece.stored_bytes <= run.room_bytes
        assert run.start_bytes <= piece.stored_offset_bytes < run.end_bytes
    if run.last > run.first:
        assert run.room_bytes <= wanted + unpacking_bytes(manifest) + 2 * 4096
        assert run_within(manifest, there, run.room_bytes).last >= run.last
        assert run_within(manifest, there, run.room_bytes - 1).last <= run.last
    behind = sum(piece.stored_bytes for piece in pieces if piece.offset_bytes >= there)
    if behind:
        assert stored_bytes_behind(manifest, there) >= behind
    if not pieces:
        return
    kept = whole_pieces_bytes(manifest, wanted)
    assert kept == manifest.weights_bytes or kept in [piece.offset_bytes for piece in pieces]
    assert all(
        piece.offset_bytes >= kept or piece.offset_bytes + piece.weights_bytes <= wanted
        for piece in pieces
    )
