"""A worker's process: how it starts, who may start it, what it outlives, how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
from pathlib import Path

import pytest

from engine.link import control
from engine.link.tokens import Finish
from tests.support.worker_stage import WorkerStage, greedy, load, worker_process
from tests.worker.conftest import Model, serving

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROMPT = [2, 7, 18, 28]


def test_it_says_who_it_is_and_keeps_to_itself(shared_worker: WorkerStage) -> None:
    async def run() -> None:
        hotbayd = await shared_worker.hotbayd()
        state = await hotbayd.describe()
        boot_id = BOOT_ID.read_text(encoding="ascii").strip()  # noqa: ASYNC240
        assert (state.pid, state.boot_id) == (shared_worker.pid, boot_id)
        assert (state.protocol, state.partition, state.generation) == (control.PROTOCOL, "p0", 1)
        assert state.pages_total * state.page_bytes == state.memory_bytes
        assert (state.device, state.exchanging, state.exchanged) == ("host", "", None)
        assert state.link_bytes_per_s > 0
        # Unasked, once a second.
        assert (await hotbayd.state_where(lambda state: True)).call == 0
        await shared_worker.disconnect()

    asyncio.run(run())
    assert stat.S_IMODE(shared_worker.directory.stat().st_mode) == 0o700
    assert os.getsid(shared_worker.pid) == shared_worker.pid
    network = Path(f"/proc/{shared_worker.pid}/net/unix").read_text(encoding="ascii")
    assert "control.sock" in network
    inodes = {
        os.readlink(f"/proc/{shared_worker.pid}/fd/{name}")
        for name in os.listdir(f"/proc/{shared_worker.pid}/fd")
    }
    for table in ("tcp", "tcp6", "udp", "udp6"):
        lines = Path(f"/proc/{shared_worker.pid}/net/{table}").read_text(encoding="ascii")
        for line in lines.splitlines()[1:]:
            assert f"socket:[{line.split()[9]}]" not in inodes, "it listens on Unix sockets only"


def test_a_second_worker_for_a_partition_does_not_start(shared_worker: WorkerStage) -> None:
    async def run() -> None:
        runtime_dir = shared_worker.directory.parents[1]
        async with worker_process(runtime_dir) as second:
            assert await second.ended() == 2
        hotbayd = await shared_worker.hotbayd()
        assert (await hotbayd.describe()).pid == shared_worker.pid
        await shared_worker.disconnect()

    asyncio.run(run())


def test_shutdown_finishes_what_runs_and_hands_back_the_rest(
    runtime_dir: Path, prose: Model
) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            await hotbayd.attach(prose.image)
            await hotbayd.exchange(load(prose.key, prose.image))
            stream = gateway.submit(prose.key, PROMPT, greedy(100))
            await gateway.begun(stream)
            shutting = asyncio.create_task(hotbayd.done(control.Shutdown(drain_timeout_s=20.0)))
            answer = await gateway.ended(stream)
            assert answer.tokens == prose.expected(PROMPT, 100)
            await shutting
            assert await worker.ended() == 0
            assert os.listdir(worker.directory) == ["worker.lock"]

    asyncio.run(run())


def test_sigterm_ends_at_once_and_says_so_to_every_request(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway(grants=False)
            await hotbayd.attach(prose.image)
            await hotbayd.exchange(load(prose.key, prose.image))
            stream = gateway.submit(prose.key, PROMPT, greedy(240))
            await gateway.begun(stream)
            worker.process.send_signal(signal.SIGTERM)
            answer = await gateway.ended(stream)
            assert answer.finish is Finish.ERROR
            assert "shut down" in answer.error
            assert await worker.ended() == 0

    asyncio.run(run())


def test_it_serves_on_when_hotbayd_comes_and_goes(shared_worker: WorkerStage, prose: Model) -> None:
    async def run() -> None:
        async with serving(shared_worker, prose) as (hotbayd, gateway):
            stream = gateway.submit(prose.key, PROMPT, greedy(200))
            await gateway.begun(stream)
            await hotbayd.close()
            answer = await gateway.ended(stream)
            assert answer.tokens == prose.expected(PROMPT, 200)

    asyncio.run(run())


def test_copies_of_the_host_device_go_past_the_caches(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that was started is told, and what the C library was told besides stays."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=5")

    async def told() -> str:
        async with worker_process(runtime_dir) as worker:
            assert (await (await worker.hotbayd()).describe()).engines == ()
            return await asyncio.to_thread(Path(f"/proc/{worker.process.pid}/environ").read_text)

    # The C library cuts the value in two where it lies.
    environment = asyncio.run(told()).replace("\0", ":")
    assert "GLIBC_TUNABLES=glibc.malloc.tcache_count=5:" in environment
    assert ":glibc.cpu.x86_non_temporal_threshold=0x100000:" in environment


@pytest.mark.slow
def test_sigterm_ends_a_worker_that_hangs(runtime_dir: Path, prose: Model) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir, "--failpoints", "evicted=hang") as worker:
            hotbayd = await worker.hotbayd()
            await hotbayd.attach(prose.image)
            loading = asyncio.create_task(hotbayd.call(load(prose.key, prose.image)))
            await hotbayd.stage("load", control.Stage.EVICTING)
            worker.process.send_signal(signal.SIGTERM)
            assert await worker.ended() == 0
            await asyncio.gather(loading, return_exceptions=True)

    asyncio.run(run())
