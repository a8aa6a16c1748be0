"""The doctor: each probe on hosts that lack something, on this host, and asked as a program."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.json_format import Parse
from hotbay.v1 import doctor_pb2

from daemon.control.config import Config
from daemon.control.config_file import load
from daemon.control.doctor import report
from daemon.control.doctor.findings import Finding, State, Subject, ok
from daemon.control.doctor.gpu_probes import MIG_CONFIG
from daemon.control.doctor.host import FakeHost, Host, SystemHost, may, read
from daemon.control.doctor.report import PROBES, examination, examine
from daemon.control.notify import Notifier
from partitioner.errors import NvmlUnavailableError
from partitioner.gpu import Gpu, GpuHealth
from tests.support.control_api import Api, play

GIB = 1 << 30
H200 = Gpu("GPU-0", 0, "NVIDIA H200", driver_version="580.95.05", mig_capable=True, numa_node=0)
GROUP = "/sys/fs/cgroup/system.slice/hotbayd.service"
SHMEM = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    """A host that lacks nothing, under systemd, as root."""
    fake = FakeHost(tmp_path / "host", programs={"nvidia-cuda-mps-control": "/usr/bin/mps"})
    fake.write("/proc/sys/kernel/osrelease", "6.8.0-generic\n")
    fake.write("/proc/self/status", "Name:\thotbayd\nCapEff:\t000001ffffffffff\n")
    fake.write("/proc/self/cgroup", "0::/system.slice/hotbayd.service\n")
    fake.write("/proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {48 << 20} kB\n")
    fake.write("/sys/fs/cgroup/cgroup.controllers", "memory pids\n")
    fake.write(f"{GROUP}/cgroup.procs", "")
    fake.write(f"{GROUP}/memory.max", "max\n")
    fake.write("/sys/fs/cgroup/system.slice/memory.max", f"{40 * GIB}\n")
    fake.write(SHMEM, "always [advise] never\n")
    (fake.root / "sys/devices/system/node/node0").mkdir(parents=True)
    return fake


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "hotbayd.toml"
    path.write_text(f"[host_store]\nbudget_bytes = {32 * GIB}\n")
    return load(path, {key: str(tmp_path / key) for key in ("state_dir", "runtime_dir")}, {})


def states(subject: Subject) -> dict[str, Finding]:
    return {each.name: each.finding for each in examine(subject)}


def worse(subject: Subject) -> dict[str, tuple[str, str]]:
    """What is not OK, by name."""
    found = states(subject).items()
    return {name: (one.state.value, one.mend) for name, one in found if one.state is not State.OK}


def test_a_host_that_lacks_nothing_is_well(host: FakeHost, config: Config) -> None:
    assert worse(Subject(config, host, (H200,))) == {}


def test_without_a_driver_that_is_missing_and_how_to_mend_it(
    host: FakeHost, config: Config
) -> None:
    found = worse(Subject(config, host, (), "this host has no NVML library"))
    assert {name for name, (state, _) in found.items() if state == "missing"} == {
        "NVML", "driver", "GPUs",
    }  # fmt: skip
    assert "install the NVIDIA driver" in found["NVML"][1]


def without_root(host: FakeHost) -> None:
    host.write("/proc/self/status", "CapEff:\t0000000000000000\n")


def with_mig_config(host: FakeHost) -> None:
    without_root(host)
    host.write(MIG_CONFIG, "DeviceFileMinor: 1\nDeviceFileMode: 256\n")
    host.write("/dev/nvidia-caps/nvidia-cap1", "")


LACKS: list[tuple[str, Any, str, str, str]] = [
    ("kernel", lambda h: h.write("/proc/sys/kernel/osrelease", "4.18.0"), "missing", "5.14", ""),
    ("kernel", lambda h: h.write("/proc/sys/kernel/osrelease", "5.10.1"), "warning", "5.14", ""),
    ("MIG rights", without_root, "missing", "CAP_SYS_ADMIN", "planned, not applied"),
    ("MIG rights", with_mig_config, "warning", "nvidia-smi -mig 1", "nvidia-cap1"),
    ("MPS", lambda h: h.programs.clear(), "warning", "nvidia-compute-utils", "not on the path"),
    ("memory", lambda h: h.write("/proc/meminfo", "MemTotal: 1048576 kB\n"), "missing",
     "budget_bytes", "32.0 GiB for images, 1.0 GiB in all"),
    ("memory", lambda h: h.write("/proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: 9 kB\n"),
     "warning", "budget_bytes", "0.0 GiB available"),
    ("memory limit", lambda h: h.write(f"{GROUP}/memory.max", str(8 * GIB)), "missing",
     "MemoryMax=", "8.0 GiB in /system.slice/hotbayd.service"),
    ("memory limit", lambda h: h.write("/proc/self/cgroup", "3:memory:/x\n"), "warning",
     "unified_cgroup_hierarchy", "no cgroup of version 2"),
    ("delegation", lambda h: (h.root / f"{GROUP}/cgroup.procs".lstrip("/")).unlink(), "warning",
     "Delegate=yes", ""),
    ("huge pages", lambda h: h.write(SHMEM, "always advise [never]"), "warning",
     "vm.nr_hugepages=16384", "4 KiB pages"),
    ("sealing", lambda h: setattr(h, "sealing", "Operation not permitted"), "missing",
     "memfd_create", "not permitted"),
    ("open files", lambda h: h.limits.update({resource.RLIMIT_NOFILE: 1024}), "warning",
     "LimitNOFILE=65536", "1024"),
    ("descriptor store", lambda h: setattr(h, "stored_max", None), "warning",
     "FileDescriptorStoreMax=512", "no service manager"),
    ("descriptor store", lambda h: setattr(h, "stored_max", 3), "warning",
     "FileDescriptorStoreMax=512", "keeps 3"),
    ("image cache", lambda h: setattr(h, "direct_io", "Invalid argument"), "warning",
     "[image_cache]", "no O_DIRECT"),
    ("state", lambda h: setattr(h, "free", 5), "missing", "make room", "0.0 GiB free"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lack", "state", "mend", "found"), LACKS)
def test_what_is_lacking_is_named_with_what_mends_it(
    host: FakeHost, config: Config, name: str, lack: Any, state: str, mend: str, found: str
) -> None:
    lack(host)
    finding = states(Subject(config, host, (H200,)))[name]
    assert finding.state == state
    assert mend in finding.mend
    assert found in finding.found


def test_locked_memory_is_missing_only_where_images_must_be_pinned(
    host: FakeHost, config: Config
) -> None:
    without_root(host)
    host.limits[resource.RLIMIT_MEMLOCK] = 8 << 20
    subject = Subject(config, host, (H200,))
    assert worse(subject)["locked memory"][0] == "warning"
    worker = config.worker.model_copy(update={"must_be_pinned": True})
    strict = config.model_copy(update={"worker": worker})
    state, mend = worse(replace(subject, config=strict))["locked memory"]
    assert (state, "LimitMEMLOCK=infinity" in mend) == ("missing", True)
    host.limits[resource.RLIMIT_MEMLOCK] = 32 * GIB
    assert "locked memory" not in worse(subject)


GPUS: list[tuple[str, dict[str, Any], str, str]] = [
    ("driver", {"driver_version": "470.1"}, "missing", "driver 580"),
    ("driver", {"driver_version": "550.54"}, "warning", "CUDA 12"),
    ("GPUs", {"health": GpuHealth.LOST, "health_reason": "gone"}, "missing", "--gpu-reset -i 0"),
    ("MIG mode", {"mig_pending": True}, "warning", "--gpu-reset -i 0"),
    ("MIG rights", {"mig_enabled": True, "mig_pending": True, "instances": None}, "missing",
     "as root"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "state", "mend"), GPUS)
def test_gpus_in_trouble_are_named_with_what_mends_it(
    host: FakeHost, config: Config, name: str, change: dict[str, Any], state: str, mend: str
) -> None:
    found = worse(Subject(config, host, (replace(H200, **change),)))
    assert found[name][0] == state
    assert mend in found[name][1]


def test_the_control_program_is_asked_for_its_protocol(host: FakeHost, config: Config) -> None:
    subject = Subject(config, host, (H200,))
    static = "shares with multiprocessors of their own"
    found = f"/usr/bin/mps, protocol 2 (3 from driver 615); {static} from driver 590"
    assert states(subject)["MPS"].found == found
    host.outputs["/usr/bin/mps", "-p", "3", "-h"] = "namespace create NAME\n"
    host.outputs["/usr/bin/mps", "-v"] = "version 13010\n"
    assert states(subject)["MPS"].found == f"/usr/bin/mps, protocols 2 and 3; {static}"
    assert SystemHost().output("/bin/sh", "-c", "echo up; echo down") == "up\ndown\n"
    assert SystemHost().output("/bin/sh", "-c", "echo up; exit 1") == ""


def test_a_gpu_near_no_node_counts_where_there_are_several(host: FakeHost, config: Config) -> None:
    lost = replace(H200, numa_node=None)
    assert "NUMA" not in worse(Subject(config, host, (lost,)))
    (host.root / "sys/devices/system/node/node1").mkdir()
    assert worse(Subject(config, host, (lost,)))["NUMA"][0] == "warning"
    assert states(Subject(config, host, (H200,)))["NUMA"].found == "2 nodes; gpu0 at 0"


def test_a_probe_that_fails_is_a_finding_and_not_the_end(host: FakeHost, config: Config) -> None:
    def fail(subject: Subject) -> Finding:
        raise PermissionError("no")

    checks = examine(Subject(config, host), {"bad": fail, "good": lambda _: ok("yes")})
    assert [each.finding.state for each in checks] == [State.MISSING, State.OK]


def test_a_disk_that_hangs_does_not_hold_the_report(
    host: FakeHost, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(host, "direct_io_problem", lambda directory: released.wait() and "")
    monkeypatch.setattr(report, "PROBES_S_MAX", 0.05)

    async def discover() -> tuple[Gpu, ...]:
        raise NvmlUnavailableError("no library")

    nvml: Any = SimpleNamespace(discover=discover)
    try:
        told = asyncio.run(examination(config, nvml, host))
    finally:
        released.set()
    assert [each.name for each in told.checks] == ["host"]
    assert told.checks[0].state == doctor_pb2.CHECK_STATE_MISSING


@pytest.fixture(params=["system", "fake"])
def any_host(request: pytest.FixtureRequest, host: FakeHost) -> Host:
    return SystemHost() if request.param == "system" else host


def test_every_host_answers_every_effect(any_host: Host, tmp_path: Path) -> None:
    assert may(any_host, "/proc/self/status", os.R_OK)
    assert "CapEff" in (read(any_host, "/proc/self/status") or "")
    assert read(any_host, "/proc/no/such/file") is None
    assert any_host.limit(resource.RLIMIT_NOFILE) is None or any_host.limit(resource.RLIMIT_NOFILE)
    assert any_host.program("no-such-program") == ""
    assert any_host.output("/no/such/program", "-v") == ""
    assert isinstance(any_host.sealing_problem(), str)
    assert isinstance(any_host.direct_io_problem(tmp_path / "not" / "there"), str)
    assert list(tmp_path.glob("not*")) == []
    assert any_host.free_bytes(tmp_path) > 0


def test_this_host_is_looked_at_without_a_trace(config: Config) -> None:
    checks = examine(Subject(config, SystemHost()))
    assert [each.name for each in checks] == list(PROBES)
    assert not config.runtime_dir.exists()


@pytest.mark.parametrize(
    ("environment", "kept"),
    [({}, None), ({"NOTIFY_SOCKET": "/x"}, -1), ({"NOTIFY_SOCKET": "/x", "FDSTORE": "512"}, 512)],
)
def test_the_notifier_knows_how_much_is_kept(environment: dict[str, str], kept: int | None) -> None:
    assert Notifier(environment).stored_max == kept


def test_the_api_says_that_the_daemon_runs(tmp_path: Path) -> None:
    async def scenario(api: Api) -> None:
        told = await api.call(
            "hotbay.v1.DoctorService/Examine",
            doctor_pb2.ExamineRequest(),
            doctor_pb2.Examination,
        )
        assert told.simulated
        assert [each.name for each in told.checks] == ["hotbayd", *PROBES]
        assert f"pid {os.getpid()}" in told.checks[0].found

    play(tmp_path, scenario)


def test_the_program_reports_beside_whatever_runs(tmp_path: Path) -> None:
    def hotbayd(*more: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-m", "daemon.control.main", *more)
        directories = ("--state-dir", str(tmp_path / "s"), "--runtime-dir", str(tmp_path / "r"))
        return subprocess.run((*command, *directories), capture_output=True, text=True, timeout=60)

    done = hotbayd("--doctor", "json", "--simulate", "a100-80x2")
    told = Parse(done.stdout, doctor_pb2.Examination())
    lacking = [one.name for one in told.checks if one.state == doctor_pb2.CHECK_STATE_MISSING]
    assert done.returncode == bool(lacking), done.stderr
    assert told.checks[3].found == "gpu0 NVIDIA A100-SXM4-80GB, gpu1 NVIDIA A100-SXM4-80GB"
    assert list(tmp_path.iterdir()) == []
    people = hotbayd("--doctor", "--simulate", "a100-80x2").stdout
    assert people.splitlines()[0].split()[1] == "kernel:"
