"""When two looks at a checkpoint count as the same checkpoint, and when they must not."""

from __future__ import annotations

import os
import shutil
import time

import msgspec
import pytest

from swap.checkpoint import Checkpoint
from swap.identity import SETTLE_S, Identity, identify
from swap.image import TensorRecipe, plan_image

RECIPES = (
    TensorRecipe("qkv", 0, ("0.q", "0.k", "0.v"), (64, 32)),
    TensorRecipe("norm", 1, ("norm",), (32,)),
)
LAYOUT = plan_image(RECIPES, "float32", {"heads": 4})


def look(directory, recipes=RECIPES, layout=LAYOUT) -> Identity:
    with Checkpoint.open(directory) as checkpoint:
        return identify(checkpoint, recipes, layout)


def overwrite(path, offset: int) -> None:
    """Change one byte in place, and put the times back that can be put back."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 255]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def settle_ticks(path) -> None:
    """Until the file system's clock has moved on from the file's last change."""
    probe = path.with_name("probe")
    while True:
        probe.write_bytes(b"x")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            return


def test_an_untouched_checkpoint_is_the_same(checkpoint_directory):
    first = look(checkpoint_directory)
    (checkpoint_directory / "model.safetensors").read_bytes()
    assert look(checkpoint_directory) == first
    assert len(first.key) == 64


def test_weights_changed_in_place_with_all_times_put_back_are_another_checkpoint(
    checkpoint_directory,
):
    file = checkpoint_directory / "model.safetensors"
    first = look(checkpoint_directory)
    settle_ticks(file)
    overwrite(file, file.stat().st_size - 1)
    assert look(checkpoint_directory).key != first.key


def test_a_file_put_in_place_of_another_is_another_checkpoint(checkpoint_directory):
    """Also a copy with the same bytes and times: nothing tells it from another's weights."""
    file = checkpoint_directory / "model.safetensors"
    first = look(checkpoint_directory)
    copy = checkpoint_directory / "copy"
    shutil.copy2(file, copy)
    os.replace(copy, file)
    assert look(checkpoint_directory).key != first.key


def test_a_file_replaced_while_it_is_open_does_not_pass_for_the_new_one(checkpoint_directory):
    file = checkpoint_directory / "model.safetensors"
    with Checkpoint.open(checkpoint_directory) as checkpoint:
        copy = checkpoint_directory / "copy"
        shutil.copy2(file, copy)
        os.replace(copy, file)
        opened = identify(checkpoint, RECIPES, LAYOUT)
    assert opened.key != look(checkpoint_directory).key


def test_what_the_image_will_be_is_part_of_it(checkpoint_directory):
    keys = {
        look(checkpoint_directory).key,
        look(checkpoint_directory, layout=plan_image(RECIPES, "bfloat16", {"heads": 4})).key,
        look(checkpoint_directory, layout=plan_image(RECIPES, "float32", {"heads": 8})).key,
        look(
            checkpoint_directory,
            recipes=(msgspec.structs.replace(RECIPES[0], sources=("0.k", "0.q", "0.v")),),
        ).key,
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("age_s", "settled"),
    [(0.0, False), (SETTLE_S - 0.001, False), (SETTLE_S, True), (-5.0, False), (1e6, True)],
)
def test_what_changed_a_moment_ago_is_not_settled(age_s, settled):
    now_ns = time.time_ns()
    assert Identity("k", now_ns - int(age_s * 1e9)).settled(now_ns) is settled


def test_the_latest_change_counts_whatever_the_modification_time_says(checkpoint_directory):
    file = checkpoint_directory / "model.safetensors"
    os.utime(file, (1, 1))
    status = file.stat()
    found = look(checkpoint_directory)
    assert found.changed_ns == status.st_ctime_ns
    assert not found.settled(status.st_ctime_ns + 1)


def test_a_closed_checkpoint_has_none(checkpoint_directory):
    checkpoint = Checkpoint.open(checkpoint_directory)
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        identify(checkpoint, RECIPES, LAYOUT)
