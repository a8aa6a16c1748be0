"""The fleet over real processes: started, killed, adopted, replaced, ended.

The processes are stand-ins that speak the control links; signals, sockets and pids are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from daemon.control.errors import ProcessFailed
from daemon.control.notify import boot_id
from daemon.control.processes import process_record
from daemon.control.processes.child import Child
from daemon.control.processes.fleet import Fleet
from daemon.control.processes.gateway_client import GatewayClient
from daemon.control.processes.place import Commands
from daemon.control.processes.worker_client import WorkerClient
from engine.link import control, routes

WAIT_S = 120.0


class Recorder:
    """What the fleet reported, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, ...]] = []
        self._changed = asyncio.Event()

    def _note(self, *event: str) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, wanted: Callable[[list[tuple[str, ...]]], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not wanted(self.events):
                self._changed.clear()
                await self._changed.wait()

    async def worker_up(self, client: WorkerClient, adopted: bool) -> None:
        self._note("up", client.partition, str(adopted))

    async def worker_down(self, partition: str, reason: str) -> None:
        self._note("down", partition, reason)

    async def worker_state(self, state: control.WorkerState) -> None:
        self._note("state", state.partition)

    async def gateway_up(self, client: GatewayClient, adopted: bool) -> None:
        self._note("up", "gateway", str(adopted))

    async def gateway_down(self, reason: str) -> None:
        self._note("down", "gateway", reason)

    async def demand(self, demand: routes.Demand) -> None:
        self._note("demand")

    async def metrics(self) -> str:
        return ""


def commands(root: Path, mode: Callable[[str], str] = lambda name: "well") -> Commands:
    def stand_in(role: str, directory: Path, generation: int, name: str) -> list[str]:
        module = "tests.support.stand_in"
        return [sys.executable, "-m", module, role, str(directory), str(generation), mode(name)]

    return Commands(
        runtime_dir=root,
        log_dir=root,
        gateway=lambda generation: stand_in("gateway", root / "gateway", generation, "gateway"),
        worker=lambda partition, generation: stand_in(
            "worker", root / "workers" / partition, generation, partition
        ),
    )


@contextlib.asynccontextmanager
async def running(
    root: Path, partitions: tuple[str, ...] = ("gpu0", "gpu1"), **kwargs: Callable[[str], str]
) -> AsyncIterator[tuple[Fleet, Recorder]]:
    recorder = Recorder()
    fleet = Fleet(commands(root, **kwargs), partitions, recorder)
    try:
        await fleet.start()
        yield fleet, recorder
    finally:
        await fleet.stop(0)
        leftovers = [info for info in fleet.processes() if info.role != "hotbayd"]
        assert not leftovers


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_everything_is_started_connected_and_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (fleet, recorder):
            assert set(fleet.workers) == {"gpu0", "gpu1"}
            assert fleet.gateway is not None
            assert sorted(recorder.events) == [
                ("up", "gateway", "False"),
                ("up", "gpu0", "False"),
                ("up", "gpu1", "False"),
            ]
            roles = [(info.role, info.partition) for info in fleet.processes()]
            assert roles == [
                ("hotbayd", ""),
                ("gateway", ""),
                ("worker", "gpu0"),
                ("worker", "gpu1"),
            ]
            pids = [info.pid for info in fleet.processes()[1:]]
            # Sessions of their own: a Ctrl-C meant for the daemon does not reach them.
            assert all(os.getsid(pid) == pid for pid in pids)
            sockets = [address.tokens_socket for address in fleet.addresses()]
            assert sockets == [
                str(tmp_path / "workers" / p / "tokens.sock") for p in ("gpu0", "gpu1")
            ]
        assert not any(psutil.pid_exists(pid) for pid in pids)

    run(scenario)


def test_a_killed_worker_is_replaced_and_the_other_left_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as (fleet, recorder):
            before = {info.partition: info for info in fleet.processes()}
            os.kill(before["gpu0"].pid, signal.SIGKILL)
            await recorder.until(lambda events: events.count(("up", "gpu0", "False")) == 2)
            downs = [event for event in recorder.events if event[0] == "down"]
            assert downs == [("down", "gpu0", f"process {before['gpu0'].pid} was ended by SIGKILL")]
            after = {info.partition: info for info in fleet.processes()}
            assert after["gpu1"] == before["gpu1"] or after["gpu1"].pid == before["gpu1"].pid
            assert after["gpu0"].restarts == 1
            assert after["gpu0"].generation > before["gpu0"].generation

    run(scenario)


def test_a_new_daemon_adopts_what_the_old_one_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Fleet(commands(tmp_path), ("gpu0",), Recorder())
        await first.start()
        left = {info.role: info for info in first.processes() if info.role != "hotbayd"}
        await first.detach()
        async with running(tmp_path, ("gpu0",)) as (fleet, recorder):
            assert sorted(recorder.events) == [("up", "gateway", "True"), ("up", "gpu0", "True")]
            found = {info.role: info for info in fleet.processes() if info.role != "hotbayd"}
            assert {role: info.pid for role, info in found.items()} == {
                role: info.pid for role, info in left.items()
            }
            assert found["worker"].generation == left["worker"].generation
            assert found["worker"].adopted
            # An adopted process is watched as well as one's own child.
            os.kill(found["worker"].pid, signal.SIGKILL)
            await recorder.until(lambda events: ("up", "gpu0", "False") in events)

    run(scenario)


@pytest.mark.parametrize("mode", ["mute", "old"])
def test_what_cannot_be_spoken_to_is_replaced(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.control.processes.worker_client.DESCRIBE_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        directory = tmp_path / "workers" / "gpu0"
        directory.mkdir(parents=True)
        arguments = commands(tmp_path, mode=lambda name: mode).worker("gpu0", 1)
        stuck = Child.start(arguments, None)
        process_record.write(directory, stuck.pid, boot_id())
        async with asyncio.timeout(WAIT_S):
            # The file is another process's: there is no event to wait for.
            while not (directory / "control.sock").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with running(tmp_path, ("gpu0",)) as (fleet, recorder):
            assert ("up", "gpu0", "False") in recorder.events
            assert fleet.workers["gpu0"].pid != stuck.pid
        async with asyncio.timeout(WAIT_S):
            await stuck.exited()

    run(scenario)


def test_only_who_is_about_to_be_killed_is_released_first(tmp_path: Path) -> None:
    """A worker of an MPS share that is killed with work in flight may take the others along."""

    async def scenario() -> None:
        released: list[tuple[str, int, bool]] = []

        async def release(partition: str, pid: int) -> None:
            released.append((partition, pid, psutil.pid_exists(pid)))

        made = replace(commands(tmp_path), release=release)
        recorder = Recorder()
        fleet = Fleet(made, ("gpu0/mps0", "gpu0/mps1"), recorder)
        await fleet.start()
        await fleet.remove("gpu0/mps1", 0.0)
        assert released == [], "it ended by itself"
        first = fleet.workers["gpu0/mps0"].pid
        await fleet.restart("gpu0/mps0")
        assert released == [("gpu0/mps0", first, True)]
        await recorder.until(lambda events: events.count(("up", "gpu0/mps0", "False")) == 2)
        second = fleet.workers["gpu0/mps0"].pid
        await fleet.kill()
        assert released == [("gpu0/mps0", first, True), ("gpu0/mps0", second, True)]

    run(scenario)


class Undying:
    """SIGKILL does not end these processes, as if they were stuck in the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pids: set[int] = set()
        killed = Child.kill

        async def kill(child: Child) -> None:
            if child.pid in self.pids:
                raise ProcessFailed(f"process {child.pid} is stuck in the kernel")
            await killed(child)

        monkeypatch.setattr(Child, "kill", kill)


def test_a_worker_that_sigkill_does_not_end_is_down_until_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.control.processes.place.SHUTDOWN_MARGIN_S", 0.05)
    undying = Undying(monkeypatch)

    async def scenario() -> None:
        async with running(tmp_path, ("gpu0",)) as (fleet, recorder):
            client = fleet.workers["gpu0"]
            undying.pids.add(client.pid)
            with pytest.raises(ProcessFailed, match="stuck in the kernel"):
                await fleet.restart("gpu0")
            await recorder.until(lambda events: [each[0] for each in events].count("down") == 2)
            assert client.closed, "whoever waits for its answer is told"
            assert "stuck in the kernel" in fleet.failure("gpu0")
            assert fleet.workers == {}
            assert psutil.pid_exists(client.pid), "and none is started beside it"
            undying.pids.clear()
            await recorder.until(lambda events: events.count(("up", "gpu0", "False")) == 2)
            assert fleet.workers["gpu0"].pid != client.pid

    run(scenario)


def test_a_partition_that_stays_because_its_worker_does_is_kept_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undying = Undying(monkeypatch)
    monkeypatch.setattr("daemon.control.processes.place.SHUTDOWN_MARGIN_S", 0.05)
    monkeypatch.setattr("daemon.control.processes.place.STOP_GRACE_S", 0.05)

    async def scenario() -> None:
        recorder = Recorder()
        fleet = Fleet(commands(tmp_path, lambda name: "deaf"), ("gpu0",), recorder)
        await fleet.start()
        try:
            undying.pids.add(pid := fleet.workers["gpu0"].pid)
            with pytest.raises(ProcessFailed, match="stuck in the kernel"):
                await fleet.remove("gpu0", 0.0)
            fleet.add("gpu0")
            await recorder.until(lambda events: ("up", "gpu0", "True") in events)
            assert fleet.workers["gpu0"].pid == pid
        finally:
            undying.pids.clear()
            await fleet.kill()

    run(scenario)


@pytest.mark.parametrize("ending", ["stop", "kill"])
def test_what_cannot_be_ended_keeps_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    undying = Undying(monkeypatch)
    monkeypatch.setattr("daemon.control.processes.place.SHUTDOWN_MARGIN_S", 0.05)
    monkeypatch.setattr("daemon.control.processes.place.STOP_GRACE_S", 0.05)

    async def scenario() -> None:
        fleet = Fleet(commands(tmp_path, lambda name: "deaf"), ("gpu0", "gpu1"), Recorder())
        await fleet.start()
        pids = {each.partition: each.pid for each in fleet.processes() if each.role == "worker"}
        (gateway,) = (each.pid for each in fleet.processes() if each.role == "gateway")
        undying.pids |= {gateway, pids["gpu0"]}
        try:
            await (fleet.stop(0.0) if ending == "stop" else fleet.kill())
            assert not psutil.pid_exists(pids["gpu1"])
        finally:
            undying.pids.clear()
            await fleet.kill()
        assert not any(map(psutil.pid_exists, (gateway, *pids.values())))

    run(scenario)


def test_a_worker_that_cannot_start_is_reported_and_does_not_stop_the_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        def mode(name: str) -> str:
            return "exit" if name == "gpu1" else "well"

        async with running(tmp_path, mode=mode) as (fleet, recorder):
            assert set(fleet.workers) == {"gpu0"}
            assert "exited with code 7" in fleet.failure("gpu1")
            assert "worker-gpu1.log" in fleet.failure("gpu1")
            assert fleet.failure("gpu0") == ""
            assert any(event[:2] == ("down", "gpu1") for event in recorder.events)

    run(scenario)


def test_without_a_gateway_the_start_fails(tmp_path: Path) -> None:
    async def scenario() -> None:
        fleet = Fleet(commands(tmp_path, mode=lambda name: "exit"), (), Recorder())
        with pytest.raises(ProcessFailed, match="exited with code 7"):
            await fleet.start()
        await fleet.stop(0)

    run(scenario)
