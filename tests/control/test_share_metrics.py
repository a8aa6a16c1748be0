"""Metrics of MPS clients: over the simulated library and the stand-in's daemons, real ones."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from daemon.control.services.share_metrics import ShareMetrics
from partitioner.catalogue import load_catalogue
from partitioner.gpu import Gpu
from partitioner.layout import Share
from partitioner.mps.commands import Commands
from partitioner.mps.places import MpsPlaces
from partitioner.nvml import PynvmlReader
from partitioner.readings import GpuReadings
from partitioner.simulated.install import installed
from partitioner.simulated.mps_texts import FAULT_COMMAND
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import ProcessSpec, parse_node
from tests.partitioner.test_mps_places import programs

pytestmark = pytest.mark.timeout(300)
GIB = 1 << 30
NODE = """
version: 1
gpus:
- board: h200
  mig_enabled: true
  instances: [{profile: 3g.71gb, start: 4}]
- {board: h200}
"""
SHARES = (Share(20 * GIB, 25), Share(30 * GIB, 50))
MEMORY = "hotbay_mps_client_memory_bytes"
Rows = list[tuple[str, dict[str, str], float]]


class Bench:
    """One place of a simulated node, shared, with those who watch it."""

    def __init__(self, node: SimulatedNode, places: MpsPlaces, on: str) -> None:
        reader = PynvmlReader()
        self._reader, self.node, self.places, self.on = reader, node, places, on
        self.gpu: Gpu = reader.discover()[0 if on else 1]
        self.board = node.gpus[self.gpu.index]
        self.instance = next(iter(self.gpu.instances or ()), None)
        name = f"gpu{self.gpu.index}" + (f"/{on}" if on else "")
        self.parts = [f"{name}/mps0", f"{name}/mps1"]
        self.workers: dict[str, int] = {}
        self.clients: list[asyncio.subprocess.Process] = []
        self.ended: list[str] = []

    async def begin(self, partition: str) -> int:
        """A client of a share, which is one when this returns."""
        process = await asyncio.create_subprocess_exec(
            *self.places.prefix(partition), "sh", "-c", "echo here; exec sleep 600",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self.clients.append(process)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"here\n"
        return process.pid

    async def end(self, partition: str) -> None:
        """What ends a worker: here only its name is noted."""
        self.ended.append(partition)
        for each in self.clients:
            if self.workers.get(partition) == each.pid and each.returncode is None:
                each.kill()
                await each.wait()

    async def look(self) -> None:
        await self.places.mend(lambda: self.workers, self.end)

    def rows(self) -> Rows:
        readings: tuple[GpuReadings, ...] = self._reader.readings()
        world: Any = SimpleNamespace(
            gpus=self._reader.discover(),
            partitions=dict.fromkeys(self.parts),
            owners={self.parts[0]: "team-a"},
        )
        monitor: Any = SimpleNamespace(latest=lambda: readings)
        registry = CollectorRegistry()
        registry.register(ShareMetrics(world, monitor, self.places.seen))
        families = text_string_to_metric_families(generate_latest(registry).decode())
        return [(one.name, one.labels, one.value) for each in families for one in each.samples]

    async def stop(self) -> None:
        for each in self.clients:
            if each.returncode is None:
                each.kill()
                await each.wait()
        await self.places.stop()
        self._reader.close()


def of(rows: Rows, name: str, key: str) -> dict[str, float]:
    """A family's values by one of its labels."""
    return {labels.get(key, ""): value for each, labels, value in rows if each == name}


def play(root: Path, newest: str, on: str, scenario: Any) -> None:
    node = SimulatedNode(parse_node(NODE, "node.yaml", load_catalogue()))

    async def run() -> None:
        places = MpsPlaces(root, programs("--newest", newest), "boot")
        bench = Bench(node, places, on)
        place = bench.instance.place if bench.instance is not None else None
        try:
            async with asyncio.timeout(240):
                await places.share(bench.gpu, place, SHARES)
                await scenario(bench)
        finally:
            await bench.stop()

    with installed(node):
        asyncio.run(run())


@pytest.mark.parametrize(("newest", "on"), [("2", ""), ("3", ""), ("3", "3g.71gb@4")])
def test_each_client_has_its_memory_and_limits_and_whose_it_is(
    tmp_path: Path, newest: str, on: str
) -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.rows() == [], "nobody has looked yet"
        first, second = bench.parts
        bench.workers = {first: await bench.begin(first), second: os.getpid()}
        stranger = await bench.begin(first)
        bench.board.processes = (
            ProcessSpec(pid=bench.workers[first], memory_mib=2048, on=on, mps=True),
            ProcessSpec(pid=os.getpid(), memory_mib=512, on=on),
        )
        await bench.look()
        rows = bench.rows()
        roles = {
            int(labels["pid"]): (labels["role"], labels["partition"], labels["tenant"])
            for name, labels, _ in rows
            if name == "hotbay_mps_client_info"
        }
        assert roles[bench.workers[first]] == ("worker", first, "team-a")
        assert roles[os.getpid()] == ("astray", second, "")
        assert roles[stranger] == ("stranger", "", "")
        assert bench.ended == [second], "what is seen is what is acted on"
        memory = {
            (int(labels["pid"]), labels["kind"]): value
            for name, labels, value in rows
            if name == MEMORY
        }
        assert memory == {
            (bench.workers[first], "used"): 2 * GIB,
            (bench.workers[first], "limit"): 20 * GIB,
            (os.getpid(), "used"): GIB / 2,
        }
        threads = of(rows, "hotbay_mps_client_thread_limit_ratio", "pid")
        assert threads == {str(bench.workers[first]): 0.25}
        for _, labels, _ in rows:
            assert (labels["gpu"], labels["UUID"]) == (str(bench.gpu.index), bench.gpu.uuid)
            assert labels["modelName"] == "NVIDIA H200"
            assert labels["GPU_I_PROFILE"] == on.partition("@")[0]
            number = "" if bench.instance is None else str(bench.instance.number)
            assert labels["GPU_I_ID"] == number

    play(tmp_path, newest, on, scenario)


def test_a_fault_is_shown_and_counted_and_asking_asks_no_daemon(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        first = bench.parts[0]
        bench.workers = {first: await bench.begin(first)}
        await bench.look()
        states = of(bench.rows(), "hotbay_mps_server_state", "state")
        assert states == {"starting": 0, "active": 1, "fault": 0, "gone": 0}
        commands = Commands(bench.places._programs.control, tmp_path / "gpu1", {})
        await commands.ask(FAULT_COMMAND)
        states = of(bench.rows(), "hotbay_mps_server_state", "state")
        assert states["active"] == 1, "nobody has looked since"
        during: list[dict[str, float]] = []
        end = bench.end

        async def ending(partition: str) -> None:
            during.append(of(bench.rows(), "hotbay_mps_server_state", "state"))
            await end(partition)

        await bench.places.mend(lambda: bench.workers, ending)
        assert during == [{"starting": 0, "active": 0, "fault": 1, "gone": 0}]
        await bench.places.stop()
        bench.workers = {}
        await bench.look()
        rows = bench.rows()
        assert of(rows, "hotbay_mps_server_state", "state")["gone"] == 1
        assert list(of(rows, "hotbay_mps_server_faults_total", "gpu").values()) == [2]
        await bench.look()
        assert of(bench.rows(), "hotbay_mps_server_state", "state")["active"] == 1
        await bench.places.unshare(bench.gpu.uuid, None)
        assert bench.rows() == [], "the place is gone, and so are its rows"

    play(tmp_path, "3", "", scenario)
