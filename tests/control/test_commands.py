"""The command lines that children are started with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from daemon.control.config_file import load
from daemon.control.processes.commands import commands
from engine.worker.options import parse_options
from partitioner.partition import Partition, PartitionKind

GPU = Partition("gpu0", PartitionKind.WHOLE, "GPU-12ab", 0, 80 << 30, 132, 1, "0000:10:00.0")


def worker_arguments(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "hotbayd.toml"
    path.write_text(text)
    overrides = {"runtime_dir": "/run/x", "state_dir": "/var/x"}
    made = commands(load(path, overrides, {}), {"gpu0": GPU}, lambda: ("", ""), None)
    return made.worker("gpu0", 3)[3:]


def test_a_partition_of_a_real_gpu_computes_on_it(tmp_path: Path) -> None:
    options = parse_options(worker_arguments(tmp_path, ""))
    assert (options.device, options.gpu, options.generation) == ("cuda", "GPU-12ab", 3)
    assert (options.memory_bytes, options.pool_bytes) == (80 << 30, 77 << 30)
    assert options.page_bytes == 64 << 20
    assert options.keep_mappings
    told = worker_arguments(tmp_path, "[worker]\nkeep_mappings = false\n")
    assert not parse_options(told).keep_mappings


def test_a_worker_is_told_its_link_and_how_long_to_wait_for_it(tmp_path: Path) -> None:
    options = parse_options(worker_arguments(tmp_path, "[worker]\nlink_wait_s = 2.5\n"))
    assert options.link_file == Path("/run/x/links/0000:10:00.0")
    assert options.link_wait_s == 2.5


@pytest.mark.parametrize(("throttle", "rate"), [("0", None), ("5e9", 5e9)])
def test_a_simulated_one_computes_on_the_host(
    tmp_path: Path, throttle: str, rate: float | None
) -> None:
    text = f"""
[node]
simulate = "h200x1"
[worker]
memory_bytes = 67108864
page_bytes = 4194304
link_bytes_per_s = {throttle}
"""
    options = parse_options(worker_arguments(tmp_path, text))
    assert (options.device, options.gpu, options.workspace_bytes) == ("host", "", 0)
    assert (options.memory_bytes, options.page_bytes) == (64 << 20, 4 << 20)
    assert options.link_bytes_per_s == rate


class Sharing:
    def prefix(self, partition: str) -> tuple[str, ...]:
        return ("env", f"SHARE={partition}")

    async def release(self, partition: str, pid: int) -> None:
        raise AssertionError("nobody is killed here")


def test_a_share_is_a_client_with_its_part_of_memory_and_threads() -> None:
    path = Path("/nowhere/hotbayd.toml")
    part = replace(
        GPU, id="gpu0/mps0", kind=PartitionKind.MPS, memory_bytes=20 << 30,
        place_bytes=80 << 30, thread_percent=50,
    )  # fmt: skip

    def arguments(simulate: str) -> list[str]:
        overrides = {"runtime_dir": "/run/x", "state_dir": "/var/x", "simulate": simulate}
        config = load(None, overrides, {})
        config = config.model_copy(
            update={"worker": config.worker.model_copy(update={"threads": 8})}
        )
        made = commands(config, {part.id: part}, lambda: ("", ""), path, Sharing())
        return made.worker(part.id, 1)

    words = arguments("h200x1")
    assert words[:2] == ["env", "SHARE=gpu0/mps0"]
    options = parse_options(words[5:])
    assert (options.memory_bytes, options.threads) == ((1 << 30) // 4, 4)
    options = parse_options(arguments("")[5:])
    assert (options.memory_bytes, options.gpu) == (20 << 30, "GPU-12ab")
