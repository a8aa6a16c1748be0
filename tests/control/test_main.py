"""hotbayd as a process: exit codes, the lock, signals, what it leaves behind, what it weighs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hotbay.errors import HotbayError
from hotbay.local_node import LocalNode

IDLE_BYTES_MAX = 150 << 20
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"


def hotbayd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon.control.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LocalNode]:
    with LocalNode(tmp_path) as started:
        yield started


def test_version_and_help() -> None:
    assert hotbayd("--version").stdout.startswith("hotbayd ")
    assert "--simulate BOARD|FILE" in hotbayd("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config", "/nowhere.toml"), "/nowhere.toml"),
        (("--http", "everywhere"), "HOST:PORT"),
        (("--repository", "/nowhere"), "not a directory"),
    ],
)
def test_refused_configuration_is_code_2(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    ended = hotbayd(*arguments, "--state-dir", str(tmp_path), "--runtime-dir", str(tmp_path))
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_unknown_board_and_missing_driver_are_code_3(tmp_path: Path) -> None:
    directories = ("--state-dir", str(tmp_path / "s"), "--runtime-dir", str(tmp_path / "r"))
    ended = hotbayd("--simulate", "h2000x1", *directories)
    assert ended.returncode == 3
    assert "h2000" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_unknown_fail_point_is_named(tmp_path: Path) -> None:
    directories = ("--state-dir", str(tmp_path / "s"), "--runtime-dir", str(tmp_path / "r"))
    ended = hotbayd("--simulate", "h200x1", *directories, HOTBAY_FAILPOINTS="nowhere=raise")
    assert ended.returncode == 2
    assert "nowhere=raise" in ended.stderr


def test_taken_port_is_code_3_and_nothing_stays_behind(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = hotbayd(
            *("--simulate", "h200x1", "--http", f"127.0.0.1:{port}", "--grpc", "127.0.0.1:0"),
            *("--state-dir", str(tmp_path / "s"), "--runtime-dir", str(tmp_path / "r")),
        )
    assert ended.returncode == 3
    assert "gateway" in ended.stderr
    ours = [
        each
        for each in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(each.info["cmdline"] or ())
    ]
    assert ours == []


def test_second_daemon_is_refused_and_the_first_undisturbed(node: LocalNode) -> None:
    directories = (
        *("--state-dir", node.config["node"]["state_dir"]),
        *("--runtime-dir", node.config["node"]["runtime_dir"]),
    )
    ended = hotbayd("--simulate", "h200x1", *directories)
    assert ended.returncode == 4
    assert f"pid {node.pid}" in ended.stderr
    assert node.client.node().http_address


def test_idle_daemon_is_light_and_sigterm_ends_everything(node: LocalNode) -> None:
    children = descendants(node.pid)
    assert len(children) == 2
    assert psutil.Process(node.pid).memory_info().rss < IDLE_BYTES_MAX
    assert "torch" not in Path(f"/proc/{node.pid}/maps").read_text()
    node.stop()
    assert not any(child.is_running() for child in children)
    assert not Path(node.endpoint.removeprefix("unix:")).exists()
    with LocalNode(node.directory) as again:  # all was left so that it can be started again
        assert again.client.node().http_address


def test_sighup_is_ignored_and_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    node = LocalNode(tmp_path, config={"limits": {"shutdown_drain_s": 600.0}})
    node.start()
    children = descendants(node.pid)
    os.kill(node.pid, signal.SIGHUP)
    assert node.client.node().http_address
    with socket.create_connection(tuple(node.http_url.removeprefix("http://").split(":"))) as busy:
        # A request that never comes to its end keeps the gateway draining.
        busy.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        os.kill(node.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.kill(node.pid, signal.SIGTERM)
        started_s = time.monotonic()
        gone, _ = psutil.wait_procs([psutil.Process(node.pid), *children], timeout=10)
        assert len(gone) == 3
        assert time.monotonic() - started_s < 5
    node.stop()


@pytest.mark.slow
@pytest.mark.parametrize(("point", "committed"), [("built", False), ("exchanged", True)])
def test_kill_at_a_fail_point_is_settled_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, committed: bool
) -> None:
    monkeypatch.setenv("HOTBAY_FAILPOINTS", f"{point}=kill")
    with LocalNode(tmp_path, repository=EXAMPLES) as node:
        operation = node.client.load("prose")
        psutil.wait_procs([psutil.Process(node.pid)], timeout=30)
        monkeypatch.delenv("HOTBAY_FAILPOINTS")
        node.kill()  # it is dead already; this collects it
        node.start()
        if committed:
            ended = node.client.wait(operation)
            assert ended.done
        else:
            with pytest.raises(HotbayError, match="repeat the request"):
                node.client.wait(operation)
            node.client.wait(node.client.load("prose"))
        (model,) = node.client.partition("gpu0").models
        assert (model.model, model.state) == ("prose@1", 4)
        assert len(node.client.node().host_store.images) == 1
