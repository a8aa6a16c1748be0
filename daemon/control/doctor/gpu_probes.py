"""Probes of the GPUs: driver, health, MIG and what this process may do to it, MPS.

It owns these judgements and touches the host through the subject alone. Every probe is a function
of its subject; on simulated GPUs nothing of a driver is asked for.
"""

from __future__ import annotations

import os
import re

from daemon.control.doctor.findings import Finding, Subject, missing, ok, warning
from daemon.control.doctor.host import may, read
from partitioner.gpu import Gpu, GpuHealth
from partitioner.mps.probing import NAMED_WORD, QUESTION
from partitioner.mps.static import FIRST_DRIVER, FIRST_VERSION, version_of

# CUDA 12 runs on no older driver, CUDA 13, which current builds of torch are made with, on none
# older than the second.
DRIVER_MIN = 525
DRIVER_GOOD = 580
# From this driver on MPS can be told to have namespaces and several servers: protocol 3.
DRIVER_MPS_3 = 615
MPS_PROGRAM = "nvidia-cuda-mps-control"
CAP_SYS_ADMIN = 21
MIG_CONFIG = "/proc/driver/nvidia/capabilities/mig/config"

_AS_ROOT = "run hotbayd as root, or add `AmbientCapabilities=CAP_SYS_ADMIN` to hotbayd.service"


def nvml(subject: Subject) -> Finding:
    """Whether the driver's library answers."""
    if subject.gpu_error:
        mend = "install the NVIDIA driver (`nvidia-smi` must list the GPUs), or use --simulate"
        return missing(subject.gpu_error, mend)
    return ok("simulated" if subject.simulated else "answers")


def driver(subject: Subject) -> Finding:
    """Whether the driver is new enough for the CUDA that torch brings."""
    version = next((gpu.driver_version for gpu in subject.gpus if gpu.driver_version), "")
    major = re.match(r"\d+", version)
    if major is None:
        return missing("its version is not known", "see the check of NVML")
    if int(major[0]) < DRIVER_MIN:
        return missing(version, f"install the NVIDIA driver {DRIVER_GOOD} or newer")
    if int(major[0]) < DRIVER_GOOD:
        newer = f"install the NVIDIA driver {DRIVER_GOOD} or newer, or a torch made for CUDA 12"
        return warning(version, newer)
    return ok(version)


def gpus(subject: Subject) -> Finding:
    """Whether there are GPUs, and all of them answer."""
    if not subject.gpus:
        return missing("none", "see `nvidia-smi -L`, and `dmesg | grep NVRM` for why")
    troubled = [gpu for gpu in subject.gpus if gpu.health is not GpuHealth.OK]
    if troubled:
        found = "; ".join(
            f"gpu{gpu.index} is {gpu.health}: {gpu.health_reason}" for gpu in troubled
        )
        numbers = ",".join(str(gpu.index) for gpu in troubled)
        return missing(found, f"`nvidia-smi --gpu-reset -i {numbers}`, else start the host anew")
    return ok(", ".join(f"gpu{gpu.index} {gpu.name}" for gpu in subject.gpus))


def mig_mode(subject: Subject) -> Finding:
    """Which GPUs can be cut, which are, and which wait for a reset."""
    able = [gpu for gpu in subject.gpus if gpu.mig_capable]
    waiting = [gpu for gpu in able if gpu.mig_pending != gpu.mig_enabled]
    if waiting:
        numbers = ",".join(str(gpu.index) for gpu in waiting)
        found = f"{_names(waiting)} wait for a reset to change MIG mode"
        return warning(found, f"`nvidia-smi --gpu-reset -i {numbers}` when nobody uses them")
    if not able:
        return ok("no GPU can be cut; they are used whole, or shared with MPS")
    on = [gpu for gpu in able if gpu.mig_enabled]
    return ok(f"possible on {_names(able)}; on {_names(on) if on else 'none'}")


def mig_rights(subject: Subject) -> Finding:
    """Whether this process may see, make and destroy instances, and switch MIG mode."""
    hidden = [gpu for gpu in subject.gpus if gpu.instances is None]
    if hidden:
        return missing(f"the instances of {_names(hidden)} cannot be seen", _AS_ROOT)
    if subject.simulated or not any(gpu.mig_capable for gpu in subject.gpus):
        return ok("none are needed")
    if has_capability(subject, CAP_SYS_ADMIN):
        return ok("CAP_SYS_ADMIN: layouts can be applied, MIG mode switched")
    device = _config_device(subject)
    if device and may(subject.host, device, os.R_OK):
        return warning(
            f"{device} can be read: instances can be made and destroyed, but MIG mode not switched",
            f"`nvidia-smi -mig 1` as root once; or {_AS_ROOT}",
        )
    can_read = f"`chmod a+r {device}`" if device else "load the module nvidia-caps"
    return missing(
        "neither CAP_SYS_ADMIN nor the driver's capability mig/config: layouts can be planned, not "
        "applied",
        f"{_AS_ROOT}; or let it read the capability: {can_read}",
    )


def mps(subject: Subject) -> Finding:
    """Whether MPS shares can be made, and by which protocol."""
    path = subject.host.program(MPS_PROGRAM)
    if not path:
        if subject.simulated:
            return ok("no control program; simulated GPUs need none")
        return warning(
            f"{MPS_PROGRAM} is not on the path: no MPS shares",
            "install it with the driver (Debian and Ubuntu: nvidia-compute-utils-VERSION)",
        )
    named = NAMED_WORD in subject.host.output(path, *QUESTION)
    protocol = "protocols 2 and 3" if named else f"protocol 2 (3 from driver {DRIVER_MPS_3})"
    static = version_of(subject.host.output(path, "-v")) >= FIRST_VERSION
    since = "" if static else f" from driver {FIRST_DRIVER}"
    return ok(f"{path}, {protocol}; shares with multiprocessors of their own{since}")


def has_capability(subject: Subject, number: int) -> bool:
    """Whether this process has a capability of Linux in effect."""
    status = read(subject.host, "/proc/self/status") or ""
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> number & 1)


def _config_device(subject: Subject) -> str:
    """The device file behind the driver's capability mig/config; empty where it has none."""
    minor = re.search(r"DeviceFileMinor:\s*(\d+)", read(subject.host, MIG_CONFIG) or "")
    return f"/dev/nvidia-caps/nvidia-cap{minor[1]}" if minor else ""


def _names(gpus: list[Gpu]) -> str:
    return ", ".join(f"gpu{gpu.index}" for gpu in gpus)
