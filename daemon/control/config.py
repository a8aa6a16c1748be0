"""The daemon's configuration: its sections, their keys, bounds and defaults.

Every limit is here, named with its unit and bounded; a key that is not here is none. It never reads
a file (`config_file` does). A configuration is frozen: to change it, restart, which disturbs no
traffic.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from engine.link.build import PACKED_DTYPE
from engine.link.control import WEIGHT_MAX, WEIGHT_MIN, InFlight

PORT_MAX = 65535


def _address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > PORT_MAX:
        raise ValueError(f"{value!r} is not HOST:PORT with a port of 0 to {PORT_MAX}")
    if host != "localhost":
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            raise ValueError(f"{host!r} is neither an IP address nor localhost") from None
    return value


def hub_address(value: str) -> str:
    if value and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", value):
        raise ValueError(f"{value!r} is not http(s)://HOST[:PORT][/PATH]")
    return value.rstrip("/")


def _page(value: int) -> int:
    if value % (2 << 20):
        raise ValueError("must be a multiple of 2 MiB (2097152)")
    return value


Address = Annotated[str, AfterValidator(_address)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
Seconds = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Node(Section):
    """Where the daemon listens and keeps its files. `simulate` is `BOARDxCOUNT` or a YAML file."""

    http: Address = "127.0.0.1:8000"
    grpc: Address = "127.0.0.1:8001"
    state_dir: str = ""
    runtime_dir: str = ""
    repository: str = ""
    simulate: str = ""


class HostStore(Section):
    """The budget of images in host memory. 0 is half of the host's memory.

    New memory is slow the first time it is touched. So up to `spare_bytes` of what the budget
    leaves free are made present beforehand, in the background and never during a load, for the
    largest models that are not in memory, `limits.builds_max` of them; 0 keeps none.

    `huge_pages` "auto" takes pages of 1 GiB or 2 MiB from the host's pools (vm.nr_hugepages) where
    they have enough, else asks for transparent huge pages, which the host gives where its
    shmem_enabled is `advise` or `always`; "transparent" leaves the pools to others; "off" asks for
    neither.

    With `packed`, images in bfloat16 (worker.dtype) are kept packed: some 0.7 of the bytes in the
    store, on the link and in the image cache, unpacked on the device. While one is built it counts
    as unpacked. It pays where unpacking is faster than the link, which is for a GPU to show; a host
    device unpacks less than 1 GB/s.
    """

    budget_bytes: Bytes = 0
    spare_bytes: Bytes = 32 << 30
    huge_pages: Literal["auto", "transparent", "off"] = "auto"
    packed: bool = False


class ImageCache(Section):
    """Images on disk, as they are in host memory: what was built once is read back, not built.

    `directory` is STATE_DIR/images unless given; up to `budget_bytes` are kept there, 0 keeps none,
    and a tenth of the disk stays free. `keep` "packed" keeps packed images, which take long to
    build; "all" the others too, which are built from their checkpoints nearly as fast as they are
    read back (docs/decisions/0004).
    """

    directory: str = ""
    budget_bytes: Bytes = 64 << 30
    keep: Literal["packed", "all"] = "packed"


class Models(Section):
    """What `gpuctl pull` fetches, from where and to where.

    `directory` is STATE_DIR/models unless given. `hub_endpoint` is HF_ENDPOINT of the environment,
    else https://huggingface.co; a mirror is named here. `token_file` is used where a call names
    none; without one, what huggingface_hub finds (HF_TOKEN) is. `offline`, or HF_HUB_OFFLINE,
    forbids asking a hub. At most `pulls_max` pulls run at once, with `pull_threads` files each; a
    hub that fails is asked again until no byte has come for `patience_s`. `free_bytes_min` of the
    disk stay free.
    """

    directory: str = ""
    hub_endpoint: Annotated[str, AfterValidator(hub_address)] = ""
    token_file: str = ""
    offline: bool = False
    pulls_max: Annotated[int, Field(ge=1, le=16)] = 2
    pull_threads: Annotated[int, Field(ge=1, le=32)] = 4
    pull_timeout_s: Seconds = 86400.0
    patience_s: Seconds = 300.0
    free_bytes_min: Bytes = 1 << 30


class Worker(Section):
    """What every worker is started with.

    `threads` 0 shares the host's cores among the workers. `dtype` is what weights are cast to and
    computed in: "auto" is bfloat16 where that is faster, on a GPU and on a processor that has
    instructions for it, else float32; the loaded configuration has the one that was found. Where
    answers must be the same on unlike hosts, name it. `kv_dtype` "fp8" stores the keys and values
    of every model in one byte each, with an error of some 2 per cent in each, so that as much
    memory holds twice as much context, or more; a GPU must be of compute capability 8.9 for it.
    "auto" stores them as `dtype`. `memory_bytes` is what a simulated partition has; a real one has
    what its GPU says, of which `workspace_bytes` are left to CUDA and to what steps compute in.
    `page_bytes` 0 is what suits the device: 2 MiB on the host, 64 MiB on a GPU. `link_bytes_per_s`,
    for simulated partitions, 0 does not throttle copies.
    `prefix_cache` keeps the KV of prompts, in memory that nobody else wants, for requests that
    begin with the same tokens. `parking_bytes` is host memory for the KV of paused requests, taken
    as it is needed.
    `link_wait_s` is how long a swap waits while one of another partition copies over the same PCIe
    root; it then copies beside it, and its ledger says so. `must_be_pinned` refuses images that the
    host does not let be pinned; otherwise they are copied slowly, and the ledger says so. `strict`
    makes results the same bit for bit whatever else is in a batch, which takes longer, and wants
    `step_tokens` of at most 1024. On a GPU
    `keep_mappings` leaves memory mapped where models had it, so that a swap maps nothing; turn it
    off to have a kernel fault that uses memory which its model has given up.
    """

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    page_bytes: Annotated[int, Field(ge=0, le=1 << 30), AfterValidator(_page)] = 0
    workspace_bytes: Annotated[int, Field(ge=1 << 30, le=1 << 46)] = 3 << 30
    memory_bytes: Annotated[int, Field(ge=16 << 20, le=1 << 46)] = 1 << 30
    step_tokens: Annotated[int, Field(ge=16, le=1 << 20)] = 512
    strict: bool = False
    running_requests_max: Count = 64
    waiting_requests_max: Count = 1024
    context_tokens_max: Annotated[int, Field(ge=16, le=1 << 24)] = 8192
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    kv_dtype: Literal["auto", "fp8"] = "auto"
    link_bytes_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    prefix_cache: bool = True
    parking_bytes: Bytes = 1 << 30
    link_wait_s: Seconds = 10.0
    must_be_pinned: bool = False
    keep_mappings: bool = True


AfterReboot = Literal["apply", "wait"]


class Partitions(Section):
    """After a reboot instances that hotbayd had made are made again, or named in a warning."""

    after_reboot: AfterReboot = "apply"


class Scheduling(Section):
    """Who is ACTIVE when. `max_active_models` is per partition; 0 is as many as fit.

    `in_flight` and `drain_timeout_s` are what swaps do where the caller does not say. A short drain
    is enough: what it does not finish is preserved. With `stage_ahead` models that are STANDBY are
    put into memory that nobody needs, as STAGED. `weights` says how models that are ACTIVE on one
    partition and have work at once share its time, by `name` or `name@version`; the others have 1.
    """

    max_active_models: Annotated[int, Field(ge=0, le=1024)] = 0
    swap_on_demand: bool = True
    stage_ahead: bool = True
    min_residency_s: Seconds = 1.0
    hold_timeout_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 60.0
    in_flight: Annotated[InFlight, Field(strict=False)] = InFlight.DRAIN
    drain_timeout_s: Seconds = 1.0
    weights: dict[str, Annotated[float, Field(ge=WEIGHT_MIN, le=WEIGHT_MAX)]] = {}

    def weight(self, key: str) -> float:
        """That of the model `name@version`: its own, or its name's, or 1."""
        return self.weights.get(key, self.weights.get(key.partition("@")[0], 1.0))


class Health(Section):
    """GPUs in trouble (docs/health.md).

    XIDs are heard as they come; what drivers do not report by themselves is read every
    `poll_interval_s`. Requests on a partition in trouble get `drain_timeout_s` to end before they
    are paused, or `patient_drain_s` where the driver says that they may go on. XIDs that come
    within `correlation_s` are one incident, and so long the driver may still ask for a reset.
    Workers show that they serve again within `prove_timeout_s`, in which one that does not answer
    for `answer_timeout_s` is started again.
    """

    poll_interval_s: Annotated[float, Field(ge=0.1, le=3600, allow_inf_nan=False)] = 5.0
    drain_timeout_s: Seconds = 0.3
    patient_drain_s: Seconds = 30.0
    correlation_s: Seconds = 30.0
    answer_timeout_s: Annotated[float, Field(ge=0.1, le=600, allow_inf_nan=False)] = 5.0
    prove_timeout_s: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 60.0


class Gateway(Section):
    """Bounds of what the gateway takes in."""

    held_requests_max: Count = 1024
    body_bytes_max: Annotated[int, Field(ge=1024, le=1 << 30)] = 8 << 20


class Limits(Section):
    """Bounds of the control API. Finished operations are kept for `operation_history_s`, but never
    more than `operations_kept_max` of them. `builds_max` images at once are built or read from
    disk, with `build_threads` each; more loads wait their turn."""

    operations_kept_max: Annotated[int, Field(ge=10, le=1_000_000)] = 2000
    operation_history_s: Annotated[float, Field(ge=86400, allow_inf_nan=False)] = 7 * 86400.0
    operations_open_max: Count = 256
    models_max: Count = 1000
    builds_max: Annotated[int, Field(ge=1, le=64)] = 2
    build_threads: Annotated[int, Field(ge=1, le=64)] = 4
    watch_events_max: Annotated[int, Field(ge=100, le=1_000_000)] = 10_000
    watchers_max: Count = 1024
    watcher_events_max: Annotated[int, Field(ge=16, le=100_000)] = 4096
    request_bytes_max: Annotated[int, Field(ge=4096, le=64 << 20)] = 4 << 20
    shutdown_drain_s: Seconds = 20.0


class Config(Section):
    """Everything, as loaded. Paths are absolute and never empty, but for `repository`."""

    node: Node = Node()
    host_store: HostStore = HostStore()
    image_cache: ImageCache = ImageCache()
    models: Models = Models()
    worker: Worker = Worker()
    partitions: Partitions = Partitions()
    scheduling: Scheduling = Scheduling()
    health: Health = Health()
    gateway: Gateway = Gateway()
    limits: Limits = Limits()
    failpoints: str = ""
    """For tests: `name=action,...`, see daemon.control.failpoints. Also HOTBAY_FAILPOINTS."""

    @property
    def state_dir(self) -> Path:
        return Path(self.node.state_dir)

    @property
    def runtime_dir(self) -> Path:
        return Path(self.node.runtime_dir)

    @property
    def image_dtype(self) -> str:
        """What builders make of weights."""
        assert self.worker.dtype != "auto", "config_file.load says what it is"
        packed = self.host_store.packed and self.worker.dtype == "bfloat16"
        return PACKED_DTYPE if packed else self.worker.dtype

    @property
    def control_socket(self) -> Path:
        """Where the control API listens."""
        return self.runtime_dir / "control.sock"
