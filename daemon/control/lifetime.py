"""The daemon's life: from the journal to the last process, and what signals do to it.

It owns signals, the watchdog and the order in which the node is started and stopped. A first
SIGTERM or SIGINT lets requests end and ends every process; a second one does so at once. SIGUSR2
ends the daemon alone and leaves everything serving for the next one, which is how it is upgraded.
SIGHUP is ignored. The invariant: a daemon that fails to start leaves what it found running as it
was.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal

from daemon.control.config import Config
from daemon.control.node import Node
from daemon.control.notify import Notifier
from daemon.control.state.journal import Journal
from partitioner.bounded import BoundedNvml
from partitioner.nvml import PynvmlReader
from partitioner.nvml_gate import NvmlGate
from partitioner.resetting import resetter_of
from partitioner.simulated.node import SimulatedNode

STOP_MARGIN_S = 30.0

log = logging.getLogger(__name__)


async def serve(
    config: Config, notifier: Notifier, version: str, simulated: SimulatedNode | None = None
) -> None:
    """Run until told to end. Raises ControlError or PartitionerError when it cannot start."""
    ending = asyncio.Event()
    at_once = asyncio.Event()
    handing_over = asyncio.Event()

    def on_signal() -> None:
        (at_once if ending.is_set() else ending).set()

    def on_handover() -> None:
        handing_over.set()
        ending.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGUSR2, on_handover)
    loop.add_signal_handler(signal.SIGHUP, lambda: log.info("SIGHUP is ignored"))
    watchdog = asyncio.create_task(_run_watchdog(notifier), name="watchdog")
    gate = NvmlGate()
    nvml = BoundedNvml(lambda: PynvmlReader(resetter_of(simulated), gate), gate=gate)
    journal, contents = await Journal.open(config.state_dir)
    gpus = await nvml.discover()
    node = Node(config, notifier, nvml, gpus, journal, contents, version, simulated=simulated)
    starting = asyncio.create_task(node.start(), name="start")
    stop_early = asyncio.create_task(ending.wait())
    try:
        await asyncio.wait((starting, stop_early), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            gc.collect()
            gc.freeze()
        else:
            await _end_of(starting)
        await asyncio.wait((stop_early, node.broken), return_when=asyncio.FIRST_COMPLETED)
        if node.broken.done():
            await node.broken
        log.info("stopping")
    except BaseException:
        # What was found running serves on: a daemon that cannot start must not end it.
        await node.detach()
        raise
    finally:
        stop_early.cancel()
    if handing_over.is_set():
        log.info("leaving everything to the next daemon")
        await node.detach()
    else:
        await _stop(node, notifier, config.limits.shutdown_drain_s, at_once)
    await _end_of(watchdog)


async def _stop(
    node: Node, notifier: Notifier, drain_timeout_s: float, at_once: asyncio.Event
) -> None:
    notifier.extend_timeout(drain_timeout_s + STOP_MARGIN_S)
    stopping = asyncio.create_task(node.stop(drain_timeout_s), name="stop")
    hurried = asyncio.create_task(at_once.wait())
    await asyncio.wait((stopping, hurried), return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if not stopping.done():
        log.warning("told twice to end: not waiting for requests")
        await _end_of(stopping)
        await node.kill()
    else:
        await stopping


async def _run_watchdog(notifier: Notifier) -> None:
    """Tell systemd that the main loop is alive, for ever."""
    interval_s = notifier.watchdog_interval_s
    if interval_s is None:
        return
    while True:
        notifier.watchdog()
        await asyncio.sleep(interval_s)


async def _end_of(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
