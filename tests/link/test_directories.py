"""Directories of workers: readable where that fits, short where not, and never too long."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from daemon.control.config_file import load
from daemon.control.errors import ConfigInvalid
from engine.link.directories import (
    RUNTIME_DIR_BYTES_MAX,
    SOCKET_PATH_BYTES_MAX,
    worker_directory,
)
from engine.worker.options import parse_options

SHARE = "gpu0/1g.18gb+me@4/mps12"
LONGEST = Path("/" + "r" * (RUNTIME_DIR_BYTES_MAX - 1))


def test_a_name_that_fits_is_kept() -> None:
    run = Path("/run/hotbay")
    assert worker_directory(run, SHARE) == run / "workers" / SHARE
    assert worker_directory(run, "gpu0") == run / "workers" / "gpu0"


@pytest.mark.parametrize("partition", ["gpu0", SHARE, "gpu15/" + "x" * 80])
def test_a_path_is_never_too_long_for_a_socket(partition: str) -> None:
    for spare in range(RUNTIME_DIR_BYTES_MAX):
        run = Path("/" + "r" * (RUNTIME_DIR_BYTES_MAX - 1 - spare))
        path = worker_directory(run, partition) / "control.sock"
        assert len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX


def test_short_names_follow_from_the_partition_and_differ() -> None:
    names = [f"gpu{index}/1g.18gb@{start}/mps3" for index in range(16) for start in range(8)]
    found = {worker_directory(LONGEST, name) for name in names}
    assert len(found) == len(names)
    assert {each.parent for each in found} == {LONGEST / "workers"}
    assert worker_directory(LONGEST, names[0]) == worker_directory(LONGEST, names[0])


def test_the_kernel_agrees_with_the_limit(tmp_path: Path) -> None:
    run = tmp_path / ("r" * (RUNTIME_DIR_BYTES_MAX - len(os.fsencode(tmp_path)) - 1))
    path = worker_directory(run, SHARE) / "control.sock"
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert path.exists()


def test_the_worker_listens_where_hotbayd_looks() -> None:
    arguments = ("--partition", SHARE, "--runtime-dir", str(LONGEST), "--generation", "1")
    options = parse_options((*arguments, "--memory-bytes", str(1 << 30)))
    assert options.control_socket.parent == worker_directory(LONGEST, SHARE)


def test_a_runtime_directory_that_is_too_long_is_refused_at_once(tmp_path: Path) -> None:
    directories = {"state_dir": str(tmp_path), "runtime_dir": str(LONGEST)}
    assert load(None, directories, {}).runtime_dir == LONGEST
    with pytest.raises(ConfigInvalid, match=r"has \d+ bytes; sockets in it allow \d+: give a shor"):
        load(None, {**directories, "runtime_dir": f"{LONGEST}r"}, {})
