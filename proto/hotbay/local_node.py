"""A hotbayd of one's own, in a directory of its own, for rehearsals, demos and tests.

It starts the real daemon on free loopback ports, says where it listens, and ends it with everything
it started. It owns the process and the directory's contents and nothing else; what is simulated is
the daemon's business. `kill` and a second `start` rehearse a crash: the gateway and the workers go
on, and the new daemon adopts them.

    with LocalNode(Path("/tmp/rehearsal"), repository=Path("examples/models")) as node:
        node.client.wait(node.client.load("prose"))
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hotbay.client import Client
from hotbay.errors import HotbayError

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.02
LOG_TAIL_CHARACTERS = 4000


class LocalNodeFailed(HotbayError):
    """The daemon did not start, or did not end. The message carries the end of its log."""


class LocalNode:
    """A daemon under `directory`; `config` is the configuration file's tables.

    What is simulated computes in float32 unless `config` says otherwise ([worker] dtype): the
    daemon's default follows from the host's processor, and answers are to be the same everywhere.
    `command` starts hotbayd; by default the one installed beside this Python.
    """

    def __init__(
        self,
        directory: Path,
        *,
        simulate: str = "h200x1",
        repository: Path | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        command: tuple[str, ...] = (sys.executable, "-m", "daemon.control.main"),
    ) -> None:
        self.directory = directory
        self.log_path = directory / "hotbayd.log"
        self._command = command
        self.config = {table: dict(keys) for table, keys in (config or {}).items()}
        """What the next `start` writes to the configuration file."""
        node = self.config.setdefault("node", {})
        node.setdefault("simulate", simulate)
        node.setdefault("state_dir", str(directory / "state"))
        node.setdefault("runtime_dir", str(directory / "run"))
        node.setdefault("http", "127.0.0.1:0")
        node.setdefault("grpc", "127.0.0.1:0")
        if repository is not None:
            node.setdefault("repository", str(repository.resolve()))
        if node["simulate"]:
            self.config.setdefault("worker", {}).setdefault("dtype", "float32")
        self._process: subprocess.Popen[bytes] | None = None
        self._left_running = False
        self.endpoint = f"unix:{node['runtime_dir']}/control.sock"
        self.client = Client(self.endpoint)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        assert self._process is not None, "the node was not started"
        return self._process.pid

    @property
    def http_url(self) -> str:
        """Where the OpenAI API is, as `http://host:port`."""
        return f"http://{self.client.node().http_address}"

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start the daemon and wait until it answers. Raises LocalNodeFailed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config_path = self.directory / "hotbayd.toml"
        config_path.write_text(_toml(self.config), encoding="utf-8")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "--config", str(config_path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._left_running = False
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                if self.client.node().http_address:
                    return
            except HotbayError:
                if self._process.poll() is not None:
                    raise LocalNodeFailed(
                        f"hotbayd ended with code {self._process.returncode}:\n{self._log_tail()}"
                    ) from None
            if time.monotonic() > deadline_s:
                self.kill()
                raise LocalNodeFailed(
                    f"hotbayd did not answer on {self.endpoint} within {timeout_s:g} s:\n"
                    f"{self._log_tail()}"
                )
            time.sleep(POLL_INTERVAL_S)

    def kill(self) -> None:
        """End the daemon with SIGKILL; the gateway and the workers go on without it."""
        self._end_daemon(signal.SIGKILL)

    def hand_over(self) -> None:
        """End the daemon as an upgrade does; the gateway and the workers wait for the next one."""
        self._end_daemon(signal.SIGUSR2)

    def _end_daemon(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(STOP_TIMEOUT_S)
            self._left_running = True

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the daemon and everything it started. Raises LocalNodeFailed if it does not."""
        if self._process is None:
            return
        if self._left_running:
            # What the last daemon had started lives on: another one adopts and ends that.
            self.start()
        elif self._process.poll() is not None:
            self.client.close()
            return
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise LocalNodeFailed(
                f"hotbayd did not end within {timeout_s:g} s of SIGTERM:\n{self._log_tail()}"
            ) from None

    def _log_tail(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    # JSON's strings, numbers and booleans are TOML's as well, and nothing else is in a table here.
    lines = []
    for table, keys in tables.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"
