"""Probes of host memory: how much there is, what of it may be locked, and what pages it comes in.

It owns these judgements and touches the host through the subject alone. Every probe is a function
of its subject.
"""

from __future__ import annotations

import re
import resource
from pathlib import PurePosixPath

from daemon.control.doctor.findings import Finding, Subject, missing, ok, warning
from daemon.control.doctor.gpu_probes import has_capability
from daemon.control.doctor.host import may, read
from swap import huge_pages, numa

CAP_IPC_LOCK = 14
GIB = 1 << 30
_CGROUPS = "/sys/fs/cgroup"
_WRITE = 2
_BUDGET = "set `budget_bytes` in [host_store] to less"


def memory(subject: Subject) -> Finding:
    """Whether the host store's budget can be had at all, and now."""
    budget = subject.config.host_store.budget_bytes
    figures = dict(
        re.findall(r"^(\w+):\s+(\d+) kB$", read(subject.host, "/proc/meminfo") or "", re.M)
    )
    total, available = (int(figures.get(name, 0)) << 10 for name in ("MemTotal", "MemAvailable"))
    if not total:
        return warning("/proc/meminfo cannot be read", "mount /proc")
    found = f"{_gib(budget)} for images, {_gib(total)} in all, {_gib(available)} available"
    if budget > total:
        return missing(found, _BUDGET)
    if budget > available:
        return warning(found, f"end what uses the memory, or {_BUDGET}")
    return ok(found)


def cgroup_limit(subject: Subject) -> Finding:
    """Whether a limit of the service is below the budget: the kernel would kill for it."""
    group = _cgroup(subject)
    if group is None:
        return warning(
            "no cgroup of version 2", "start the host with systemd.unified_cgroup_hierarchy=1"
        )
    limits = {}
    for each in (group, *group.parents):
        text = (read(subject.host, f"{_CGROUPS}{each}/memory.max") or "max").strip()
        if text.isdigit():
            limits[str(each)] = int(text)
    if not limits:
        return ok("none")
    name, least = min(limits.items(), key=lambda item: item[1])
    budget = subject.config.host_store.budget_bytes
    found = f"{_gib(least)} in {name}, {_gib(budget)} of it for images"
    if least <= budget:
        return missing(found, f"raise it (`MemoryMax=` of the service), or {_BUDGET}")
    return ok(found)


def delegation(subject: Subject) -> Finding:
    """Whether groups can be made below hotbayd's own, one for each tenant."""
    group = _cgroup(subject)
    if group is not None and may(subject.host, f"{_CGROUPS}{group}/cgroup.procs", _WRITE):
        return ok(f"{group} is ours")
    found = "hotbayd's cgroup is not its own: workers cannot be limited one by one"
    return warning(found, "`Delegate=yes` in [Service] of hotbayd.service")


def locked_memory(subject: Subject) -> Finding:
    """Whether images may be pinned, which copies at the link's full rate rest on."""
    if has_capability(subject, CAP_IPC_LOCK):
        return ok("not limited (CAP_IPC_LOCK)")
    limit = subject.host.limit(resource.RLIMIT_MEMLOCK)
    budget = subject.config.host_store.budget_bytes
    if limit is None:
        return ok("not limited")
    if limit >= budget:
        return ok(_gib(limit))
    found = f"{_gib(limit)}, {_gib(budget)} for images: they may have to be copied unpinned, slowly"
    mend = "`LimitMEMLOCK=infinity` in [Service] of hotbayd.service, or `ulimit -l unlimited`"
    if subject.config.worker.must_be_pinned and not subject.simulated:
        return missing(found, mend)
    return warning(found, mend)


def huge_page_pools(subject: Subject) -> Finding:
    """What images' memory is made of: small pages take longer to map and to pin."""
    setting = subject.config.host_store.huge_pages
    mm = subject.host.root / "sys/kernel/mm"
    pools, rule = mm / "hugepages", mm / "transparent_hugepage/shmem_enabled"
    described = huge_pages.describe(setting, pools, rule)
    budget = subject.config.host_store.budget_bytes
    if setting == "off":
        return ok("none are asked for ([host_store] huge_pages)")
    pooled = sum(huge_pages.free_bytes(each, pools) for each in huge_pages.POOL_PAGE_BYTES)
    if "huge" in described and (
        setting != "auto" or pooled >= budget or "transparent" in described
    ):
        return ok(described)
    pages = -(-budget // (2 << 20))
    return warning(
        described,
        f"`sysctl -w vm.nr_hugepages={pages}` for all of the budget, or `echo advise > "
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled`",
    )


def numa_nodes(subject: Subject) -> Finding:
    """Whether it is known which memory is near which GPU, where that makes a difference."""
    nodes = numa.nodes(subject.host.root / "sys/devices/system/node")
    if len(nodes) < 2:
        return ok("one node")
    untold = [gpu for gpu in subject.gpus if gpu.numa_node is None]
    near = ", ".join(
        f"gpu{gpu.index} at {gpu.numa_node}" for gpu in subject.gpus if gpu not in untold
    )
    if untold:
        names = ", ".join(f"gpu{gpu.index}" for gpu in untold)
        return warning(
            f"{len(nodes)} nodes; the driver does not tell which is near {names}",
            "switch on NUMA in the firmware (not `interleave`), or pass the topology to the VM",
        )
    return ok(f"{len(nodes)} nodes; {near}")


def sealing(subject: Subject) -> Finding:
    """Whether images can be shared as memory files that nobody can change."""
    problem = subject.host.sealing_problem()
    if not problem:
        return ok("memory files can be sealed")
    return missing(
        f"memory files: {problem}", "allow memfd_create and fcntl in the service's SystemCallFilter"
    )


def _cgroup(subject: Subject) -> PurePosixPath | None:
    """This process's group in the hierarchy of version 2."""
    told = re.search(r"^0::(/.*)$", read(subject.host, "/proc/self/cgroup") or "", re.MULTILINE)
    if told is None or read(subject.host, f"{_CGROUPS}/cgroup.controllers") is None:
        return None
    return PurePosixPath(told[1])


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
