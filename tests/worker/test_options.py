"""A worker's arguments: what is taken, and what is refused before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.worker.errors import FailPointReached, OptionInvalid
from engine.worker.failpoints import Action, FailPoint, FailPoints, Trigger, parse_failpoints
from engine.worker.options import parse_options

BASE = ["--partition", "p0", "--runtime-dir", "/run/x", "--generation", "3"]
SIZED = [*BASE, "--memory-bytes", str(64 << 20)]


def test_arguments_become_options() -> None:
    options = parse_options([*SIZED, "--threads", "2", "--link-bytes-per-s", "5e9"])
    assert options.control_socket == Path("/run/x/workers/p0/control.sock")
    assert options.tokens_socket == Path("/run/x/workers/p0/tokens.sock")
    assert (options.generation, options.threads, options.link_bytes_per_s) == (3, 2, 5e9)


def test_a_gpu_has_large_pages_and_keeps_a_workspace() -> None:
    options = parse_options([*BASE, "--memory-bytes", str(16 << 30), "--device", "cuda"])
    assert (options.page_bytes, options.workspace_bytes) == (64 << 20, 3 << 30)
    assert options.pool_bytes == 13 << 30
    host = parse_options(SIZED)
    assert (host.page_bytes, host.pool_bytes) == (2 << 20, 64 << 20)


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_without_a_gpu_a_worker_for_one_says_what_is_missing(tmp_path: Path) -> None:
    arguments = ["--partition", "p0", "--runtime-dir", str(tmp_path), "--generation", "1"]
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "engine.worker.main", *arguments, "--device", "cuda"),
            *("--memory-bytes", str(16 << 30), "--gpu", "GPU-0"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "install the NVIDIA driver" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*BASE, "--memory-bytes", "1"], "--memory-bytes"),
        ([*SIZED, "--page-bytes", "4096"], "--page-bytes"),
        ([*SIZED, "--page-bytes", str((2 << 20) + 4096)], "multiple"),
        ([*SIZED, "--threads", "0"], "--threads"),
        ([*SIZED, "--step-tokens", "0"], "--step-tokens"),
        ([*SIZED, "--parking-bytes", "-1"], "--parking-bytes"),
        ([*SIZED, "--stage-timeout-s", "nan"], "--stage-timeout-s"),
        ([*SIZED, "--link-bytes-per-s", "0"], "--link-bytes-per-s"),
        ([*SIZED, "--partition", "../up"], "--partition"),
        ([*SIZED, "--partition", "gpu0/../up"], "--partition"),
        ([*SIZED, "--partition", "/gpu0"], "--partition"),
        ([*SIZED, "--device", "cuda"], "--memory-bytes"),
        ([*SIZED, "--gpu", "GPU-1"], "--gpu"),
        ([*SIZED, "--workspace-bytes", "-1"], "--workspace-bytes"),
        (
            [*BASE, "--memory-bytes", "8000000000", *("--device", "cuda"), "--link-bytes-per-s=1"],
            "--link-bytes-per-s",
        ),
        ([*SIZED, "--runtime-dir", "/" + "x" * 100], "--runtime-dir"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(arguments: list[str], named: str) -> None:
    with pytest.raises(OptionInvalid, match=named):
        parse_options(arguments)


def test_the_program_says_why_it_does_not_start() -> None:
    command = [sys.executable, "-m", "engine.worker.main", *SIZED, "--threads", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "--threads is 0" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_fail_points_are_read_by_name() -> None:
    assert parse_failpoints("planned=raise,copying+2=hang") == {
        FailPoint.PLANNED: Trigger(Action.RAISE),
        FailPoint.COPYING: Trigger(Action.HANG, skip=2),
    }
    assert parse_failpoints("") == {}
    for wrong in ("nowhere=raise", "planned=explode", "planned", "planned+x=raise"):
        with pytest.raises(OptionInvalid, match="rolling-back"):
            parse_failpoints(wrong)


def test_a_fail_point_fires_once() -> None:
    points = FailPoints({FailPoint.EVICTED: Trigger(Action.RAISE, skip=1)})
    points.reach(FailPoint.COPIED, hang=pytest.fail)
    points.reach(FailPoint.EVICTED, hang=pytest.fail)
    with pytest.raises(FailPointReached, match="evicted"):
        points.reach(FailPoint.EVICTED, hang=pytest.fail)
    points.reach(FailPoint.EVICTED, hang=pytest.fail)


def test_a_hang_that_is_interrupted_raises_the_interruption() -> None:
    class Interrupted(Exception):
        pass

    def hang() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        FailPoints({FailPoint.EVICTED: Trigger(Action.HANG)}).reach(FailPoint.EVICTED, hang)
