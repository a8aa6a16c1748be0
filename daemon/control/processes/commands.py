"""How the gateway and the workers are started: their command lines, from the configuration.

The command line is everything a child knows; only what makes a worker a client of MPS is for the
CUDA library and has to be in the environment, where `env` puts it on that command line. An address
with port 0 is chosen once: a gateway that is started again listens where the first one did.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec

from daemon.control.config import Config
from daemon.control.processes.place import Commands
from partitioner.partition import Partition


class Sharing(Protocol):
    """The places under MPS; see `partitioner.mps.places.MpsPlaces`."""

    def prefix(self, partition: str) -> tuple[str, ...]: ...
    async def release(self, partition: str, pid: int) -> None: ...


def commands(
    config: Config,
    partitions: dict[str, Partition],
    listening: Callable[[], tuple[str, str]],
    log_dir: Path | None,
    sharing: Sharing | None = None,
) -> Commands:
    """Command lines by generation. `listening` is where a gateway was found, or empty strings.

    `sharing` makes workers of shares its clients.
    """
    worker = config.worker
    cores = len(os.sched_getaffinity(0))

    def gateway(generation: int) -> list[str]:
        http, grpc = listening()
        settings = {"generation": generation, "body_bytes_max": config.gateway.body_bytes_max}
        return [
            *(sys.executable, "-m", "daemon.gateway.main"),
            *("--runtime-dir", str(config.runtime_dir)),
            *("--http", http or config.node.http),
            *("--grpc", grpc or config.node.grpc),
            *("--config-json", msgspec.json.encode(settings).decode()),
        ]

    def start_worker(partition: str, generation: int) -> list[str]:
        # Partitions come and go; whoever starts takes a share of what there are then.
        threads = worker.threads or max(1, cores // max(1, len(partitions)))
        threads = max(1, threads * partitions[partition].thread_percent // 100)
        page = ("--page-bytes", str(worker.page_bytes)) if worker.page_bytes else ()
        return [
            *(sharing.prefix(partition) if sharing is not None else ()),
            *(sys.executable, "-m", "engine.worker.main"),
            *("--partition", partition),
            *("--runtime-dir", str(config.runtime_dir)),
            *("--generation", str(generation)),
            *_device(config, partitions[partition]),
            *page,
            *("--link", partitions[partition].link),
            *("--link-wait-s", str(worker.link_wait_s)),
            *("--threads", str(threads)),
            *("--step-tokens", str(worker.step_tokens)),
            "--prefix-cache" if worker.prefix_cache else "--no-prefix-cache",
            *("--parking-bytes", str(worker.parking_bytes)),
            *(("--strict",) if worker.strict else ()),
            *(("--must-be-pinned",) if worker.must_be_pinned else ()),
        ]

    made = Commands(config.runtime_dir, log_dir, gateway, start_worker)
    return made if sharing is None else replace(made, release=sharing.release)


def _device(config: Config, partition: Partition) -> list[str]:
    """What a worker computes on: the host's memory for a simulated partition, else its GPU."""
    worker = config.worker
    if config.node.simulate:
        throttle = worker.link_bytes_per_s
        return [
            *("--device", "host"),
            *("--memory-bytes", str(_simulated_bytes(worker.memory_bytes, partition))),
            *(("--link-bytes-per-s", repr(throttle)) if throttle else ()),
        ]
    return [
        *("--device", "cuda"),
        *("--gpu", partition.device_uuid or partition.gpu_uuid),
        *("--memory-bytes", str(partition.memory_bytes)),
        *("--workspace-bytes", str(worker.workspace_bytes)),
        *(() if worker.keep_mappings else ("--no-keep-mappings",)),
    ]


def _simulated_bytes(memory_bytes: int, partition: Partition) -> int:
    """A share has as large a part of the simulated memory as of its place's."""
    if not partition.place_bytes:
        return memory_bytes
    return memory_bytes * partition.memory_bytes // partition.place_bytes
