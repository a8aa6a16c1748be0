"""Processes of others in the way of a layout: named, ended when somebody insists, never guessed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.longrunning import operations_proto_pb2 as longrunning
from hotbay.operations import operation_response
from hotbay.v1 import partition_pb2

from daemon.control.errors import Refused
from daemon.control.processes.holders import (
    Holder,
    Holders,
    HostHolders,
    SimulatedHolders,
    holders_of,
)
from partitioner.geometry import Instance
from partitioner.simulated.node import SimulatedNode
from partitioner.simulation import ProcessSpec, parse_simulate
from tests.control.test_layout_changes import (
    SERVICE,
    THREE,
    TWO,
    apply,
    begin,
    board,
    clean,
    plan,
    play,
    reason_of,
)
from tests.support.control_api import Api, refusal
from tests.support.control_peers import Worker

OPENS = "import signal, sys; f = open(sys.argv[1]); {more}; print('up', flush=True); signal.pause()"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "nvidia0"
    path.write_text("")
    return path


@pytest.fixture
def tenant(device: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process with the device open, which is collected when it ends."""
    started: list[subprocess.Popen[str]] = []

    def start(more: str = "0", path: Path = device) -> subprocess.Popen[str]:
        command = (sys.executable, "-c", OPENS.format(more=more), str(path))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def host(device: Path, **limits: float) -> HostHolders:
    return HostHolders(str(device), **limits)


def test_a_process_is_described_and_asked_to_end(device: Path, tenant: Any) -> None:
    process, holders = tenant(), host(device)
    holder = holders.describe(process.pid, "gpu0")
    assert (holder.pid, holder.where) == (process.pid, "gpu0")
    assert str(device) in holder.command
    assert holder.owner == holders.describe(os.getpid(), "").owner != ""
    asyncio.run(holders.end([holder]))
    assert process.wait() == -signal.SIGTERM


def test_one_that_does_not_listen_is_killed(device: Path, tenant: Any) -> None:
    process, holders = tenant(STUBBORN), host(device, term_wait_s=0.05)
    asyncio.run(holders.end([holders.describe(process.pid, "gpu0")]))
    assert process.wait() == -signal.SIGKILL


def test_one_that_is_still_there_is_named(device: Path, tenant: Any) -> None:
    process = tenant(STUBBORN)
    holders = host(device, term_wait_s=0.0, kill_wait_s=0.0)
    with pytest.raises(Refused, match=f"pid {process.pid} .*stuck in the driver") as caught:
        asyncio.run(holders.end([holders.describe(process.pid, "gpu0")]))
    assert caught.value.metadata == {"pids": str(process.pid)}


def test_nobody_is_signalled_unless_all_may_be(device: Path, tenant: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    process, stranger = tenant(), tenant(path=other)
    holders = host(device)
    listed = [holders.describe(each.pid, "gpu0") for each in (process, stranger)]
    with pytest.raises(Refused, match="is of another pid namespace"):
        asyncio.run(holders.end(listed))
    assert (process.poll(), stranger.poll()) == (None, None)
    for pid in (1, os.getpid(), os.getppid()):
        with pytest.raises(Refused, match="never ended"):
            asyncio.run(holders.end([holders.describe(pid, "gpu0")]))


def test_a_number_that_was_given_anew_is_left_alone(device: Path, tenant: Any) -> None:
    process, holders = tenant(), host(device)
    before = holders.describe(process.pid, "gpu0")
    earlier = Holder(before.pid, "gpu0", before.command, before.owner, before.started - 1)
    asyncio.run(holders.end([earlier]))
    assert process.poll() is None
    process.kill()
    process.wait()
    asyncio.run(holders.end([before]))  # gone: nothing to do
    assert holders.describe(process.pid, "x") == Holder(process.pid, "x")


def test_simulated_processes_are_nobody_on_this_host(tenant: Any) -> None:
    node = SimulatedNode(parse_simulate("h200"))
    process = tenant()
    node.gpus[0].processes = (ProcessSpec(pid=process.pid, memory_mib=1),)
    holders: Holders = holders_of(node)
    assert isinstance(holders, SimulatedHolders)
    asyncio.run(holders.end([holders.describe(process.pid, "gpu0")]))
    assert node.gpus[0].processes == ()
    assert process.poll() is None
    assert isinstance(holders_of(None), HostHolders)


# Through the API.


def ended(operation: Any) -> list[tuple[int, str]]:
    response = operation_response(operation)
    assert isinstance(response, partition_pb2.ApplyLayoutResponse)
    return [(each.pid, each.partition) for each in response.ended]


def occupied(tmp_path: Path, scenario: Callable[[Api, Any], Awaitable[None]], *models: str) -> None:
    """TWO applied, with processes of others on both instances and a plan that takes one away."""

    async def run(api: Api) -> None:
        await apply(api, TWO)
        gpu = api.stage.board.gpus[0]
        gpu.processes = (
            ProcessSpec(pid=71, memory_mib=1, on="2g.35gb@0"),
            ProcessSpec(pid=72, memory_mib=1, on="3g.71gb@4"),
        )
        await scenario(api, gpu)

    play(tmp_path, run, *models)


def test_what_goes_is_cleared_and_what_stays_is_not(tmp_path: Path) -> None:
    async def scenario(api: Api, gpu: Any) -> None:
        plan_id = (await plan(api, THREE)).plan_id
        tried = await begin(api, plan_id, force=True, validate_only=True)
        assert ended(tried) == [(71, "gpu0/2g.35gb@0")]
        assert len(gpu.processes) == 2, "nothing was changed"
        done = await api.wait(await begin(api, plan_id, force=True, end_pids=[71]))
        assert ended(done) == [(71, "gpu0/2g.35gb@0")]
        assert [each.pid for each in gpu.processes] == [72]
        assert board(api.stage) == ["1g.18gb@0", "3g.71gb@4"]

    occupied(tmp_path, scenario)


def test_only_who_was_listed_is_ended(tmp_path: Path) -> None:
    async def scenario(api: Api, gpu: Any) -> None:
        plan_id = (await plan(api, THREE)).plan_id
        _, reason, metadata, _ = await refusal(begin(api, plan_id, force=True, end_pids=[72]))
        assert (reason, metadata) == ("PARTITION_IN_USE", {"pids": "71"})
        assert len(gpu.processes) == 2
        assert clean(api.stage)

    occupied(tmp_path, scenario)


def test_who_cannot_be_ended_rolls_the_change_back(tmp_path: Path) -> None:
    async def scenario(api: Api, gpu: Any) -> None:
        stage = api.stage
        journalled: list[tuple[str, ...]] = []

        class Failing:
            def describe(self, pid: int, where: str) -> Holder:
                return Holder(pid, where, "train.py")

            async def end(self, holders: Any) -> None:
                change = stage.node.parts.layout_changes._open
                assert change is not None
                journalled.append(change.ending)
                raise Refused("still there", reason="PARTITION_IN_USE")

        stage.node.parts.layout_changes._forcing._holders = Failing()
        done = await api.wait(await begin(api, (await plan(api, THREE)).plan_id, force=True))
        assert reason_of(done) == "PARTITION_IN_USE"
        assert journalled == [("pid 71 on gpu0/2g.35gb@0 (train.py)",)]
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"]
        assert set(stage.node.world.partitions) == {"gpu0/2g.35gb@0", "gpu0/3g.71gb@4"}
        assert clean(stage)

    occupied(tmp_path, scenario)


def test_instances_of_others_are_destroyed_or_taken_over_once_empty(tmp_path: Path) -> None:
    """`found: destroy`: 1g@2 goes, 3g@4 becomes ours, and nobody may be on either."""

    async def scenario(api: Api) -> None:
        stage = api.stage
        gpu = stage.board.gpus[0]
        gpu.mig_current = gpu.mig_pending = True
        places = (Instance(2, 1, "1g.18gb"), Instance(4, 4, "3g.71gb"))
        theirs = tuple(
            stage.board.make_instance(gpu, number, place)
            for number, place in enumerate(places, start=1)
        )
        stage.board.cut(gpu, theirs)
        gpu.processes = (ProcessSpec(pid=72, memory_mib=1, on="3g.71gb@4"),)
        ignored = await plan(
            api, "version: 1\ngpus:\n- {index: 0, partitions: [{profile: 2g.35gb}]}\n"
        )
        assert list(ignored.foreign) == ["gpu0/1g.18gb@2", "gpu0/3g.71gb@4"]
        planned = await plan(api, f"found: destroy\n{TWO}")
        assert planned.plan_id != (await plan(api, f"found: adopt\n{TWO}")).plan_id
        assert list(planned.gpus[0].cleared) == ["gpu0/1g.18gb@2", "gpu0/3g.71gb@4"]
        assert (list(planned.destroy), list(planned.keep)) == (
            ["gpu0/1g.18gb@2"], ["gpu0/3g.71gb@4"],
        )  # fmt: skip
        _, reason, metadata, message = await refusal(begin(api, planned.plan_id))
        assert (reason, metadata) == ("PARTITION_IN_USE", {"pids": "72"})
        assert "take over gpu0/3g.71gb@4" in message
        assert gpu.instances == theirs
        stage.workers["gpu0/3g.71gb@4"] = Worker(tmp_path / "run", "gpu0/3g.71gb@4", 64 << 20)
        done = await api.wait(await begin(api, planned.plan_id, force=True))
        assert ended(done) == [(72, "gpu0/3g.71gb@4")]
        assert board(stage) == ["2g.35gb@0", "3g.71gb@4"]
        assert set(stage.node.world.partitions) == {"gpu0/2g.35gb@0", "gpu0/3g.71gb@4"}
        assert not (await plan(api, f"found: destroy\n{TWO}")).changes, "they are ours now"

    play(tmp_path, scenario)


def test_the_answer_of_a_call_lists_whom_it_ended(tmp_path: Path) -> None:
    async def scenario(api: Api, gpu: Any) -> None:
        plan_id = (await plan(api, THREE)).plan_id
        request = partition_pb2.ApplyLayoutRequest(plan_id=plan_id, force=True, validate_only=True)
        tried = await api.call(f"{SERVICE}/ApplyLayout", request, longrunning.Operation)
        response = operation_response(tried)
        assert isinstance(response, partition_pb2.ApplyLayoutResponse)
        (only,) = response.ended
        assert (only.command, only.owner) == ("a simulated process", "nobody")

    occupied(tmp_path, scenario)
