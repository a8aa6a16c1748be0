"""The report: every probe in one table, made into the API's message or into lines.

It owns the order of the checks and the time that all of them may take. The invariant: a probe that
fails is a finding like any other, never the end of the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hotbay.v1 import doctor_pb2

from daemon.control.config import Config
from daemon.control.doctor import gpu_probes, memory_probes, system_probes
from daemon.control.doctor.findings import Check, Finding, Probe, State, Subject, missing
from daemon.control.doctor.host import Host
from partitioner.bounded import BoundedNvml, CallThread
from partitioner.errors import NvmlTimeoutError, PartitionerError

PROBES_S_MAX = 8.0
"""In a thread that nobody waits for after that: so a file system that hangs is found."""

PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "kernel": system_probes.kernel,
        "NVML": gpu_probes.nvml,
        "driver": gpu_probes.driver,
        "GPUs": gpu_probes.gpus,
        "MIG mode": gpu_probes.mig_mode,
        "MIG rights": gpu_probes.mig_rights,
        "MPS": gpu_probes.mps,
        "memory": memory_probes.memory,
        "memory limit": memory_probes.cgroup_limit,
        "delegation": memory_probes.delegation,
        "locked memory": memory_probes.locked_memory,
        "huge pages": memory_probes.huge_page_pools,
        "NUMA": memory_probes.numa_nodes,
        "sealing": memory_probes.sealing,
        "open files": system_probes.open_files,
        "descriptor store": system_probes.descriptor_store,
        "state": system_probes.state_disk,
        "image cache": system_probes.image_cache,
        "sockets": system_probes.sockets,
    }
)

_STATES: Mapping[State, doctor_pb2.CheckState.ValueType] = MappingProxyType(
    {
        State.OK: doctor_pb2.CHECK_STATE_OK,
        State.WARNING: doctor_pb2.CHECK_STATE_WARNING,
        State.MISSING: doctor_pb2.CHECK_STATE_MISSING,
    }
)


def examine(subject: Subject, probes: Mapping[str, Probe] = PROBES) -> tuple[Check, ...]:
    """Every check of a subject."""
    return tuple(Check(name, _look(probe, subject)) for name, probe in probes.items())


async def examination(config: Config, nvml: BoundedNvml, host: Host) -> doctor_pb2.Examination:
    """Examine this host. Takes no longer than NVML's deadline and PROBES_S_MAX."""
    try:
        subject = Subject(config, host, gpus=await nvml.discover())
    except PartitionerError as error:
        subject = Subject(config, host, gpu_error=str(error))
    calls = CallThread("doctor", PROBES_S_MAX)
    try:
        checks = await calls.call("the probes", lambda: examine(subject))
    except NvmlTimeoutError:
        found = f"no answer of a file system in {PROBES_S_MAX:g} s"
        checks = (Check("host", missing(found, "look for a disk that hangs: `dmesg`, `df`")),)
    finally:
        calls.stop()
    return doctor_pb2.Examination(
        checks=[
            doctor_pb2.Check(
                name=each.name,
                state=_STATES[each.finding.state],
                found=each.finding.found,
                mend=each.finding.mend,
            )
            for each in checks
        ],
        simulated=subject.simulated,
    )


def _look(probe: Probe, subject: Subject) -> Finding:
    try:
        return probe(subject)
    except (OSError, ValueError) as error:
        return missing(f"cannot be looked at: {error}", "see the message")
