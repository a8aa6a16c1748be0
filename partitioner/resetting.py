"""Resetting one GPU, so that a change of MIG mode that waits for it is made (Ampere).

It owns the effect: the driver's own tool, told one GPU by its bus address, bounded in time. It
decides nothing: whoever calls has made sure that nobody uses the GPU, and lets go of NVML for as
long as it takes. The invariant: never another GPU, and a reset that is refused says who is in the
way, as far as this process may see it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Protocol

from partitioner.errors import ResetNeededError
from partitioner.gpu import Gpu
from partitioner.simulated.node import SimulatedNode

RESET_TIMEOUT_S = 15.0
"""It runs within one NVML call: with `nvml_gate.ALONE_WAIT_S` before it, NVML let go of and opened
again, the whole has to end within `bounded.DEFAULT_DEADLINE_S`, or it is told as a stuck driver."""
SMI = "nvidia-smi"
PROCESSES_NAMED_MAX = 8


class Resetter(Protocol):
    """Resets a GPU."""

    def reset(self, gpu: Gpu) -> None:
        """Reset this one; raises `ResetNeededError` where that is refused or does not end."""
        ...


class SmiResetter:
    """By `nvidia-smi --gpu-reset`: NVML itself has no such call. Needs root."""

    def __init__(self, program: str = SMI, proc: Path = Path("/proc")) -> None:
        self._program = program
        self._proc = proc

    def reset(self, gpu: Gpu) -> None:
        command = (self._program, "--gpu-reset", "-i", gpu.pci_id)
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=RESET_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _refused(gpu, str(error), ()) from error
        if done.returncode != 0:
            told = " ".join(done.stdout.decode("utf-8", "replace").split())
            raise _refused(gpu, told, openers(f"/dev/nvidia{gpu.minor}", self._proc))


class SimulatedResetter:
    """Resets a GPU of a simulated node; its processes are as much in the way as real ones."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node

    def reset(self, gpu: Gpu) -> None:
        simulated = self._node.gpu(gpu.uuid)
        if not self._node.reset(simulated):
            pids = tuple(str(process.pid) for process in simulated.processes)
            raise _refused(gpu, "it is in use by another client", pids)


def resetter_of(simulated: SimulatedNode | None) -> Resetter:
    """What resets GPUs: of a simulated node, or real ones."""
    return SmiResetter() if simulated is None else SimulatedResetter(simulated)


def openers(device: str, proc: Path = Path("/proc")) -> tuple[str, ...]:
    """`PID (name)` of the processes that have a device file open, as far as one may look."""
    found = []
    for directory in sorted(proc.glob("[0-9]*")):
        try:
            if any(str(each.readlink()) == device for each in (directory / "fd").iterdir()):
                found.append(f"{directory.name} ({(directory / 'comm').read_text().strip()})")
        except OSError:
            continue  # it has ended, or is not ours to look at
    return tuple(found[:PROCESSES_NAMED_MAX])


def _refused(gpu: Gpu, problem: str, holders: tuple[str, ...]) -> ResetNeededError:
    who = f" (open in: {', '.join(holders)})" if holders else ""
    return ResetNeededError(
        f"gpu{gpu.index} cannot be reset: {problem}{who}; end what uses it (monitoring and "
        "nvidia-persistenced too) and apply again, or switch MIG mode with `nvidia-smi -mig` and "
        "start the host anew, which is the only way in some virtual machines"
    )
