"""The daemon's configuration: a TOML file, overridden by flags, checked whole before anything runs.

This is the only module that reads the environment. Every limit is here, named with its unit and
bounded; an unknown key is refused with the nearest known one, since a misspelt limit would silently
not be one. A loaded configuration is frozen: to change it, restart, which disturbs no traffic.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from daemon.control.errors import ConfigInvalid
from engine.link.control import InFlight

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

    `huge_pages` "auto" asks for transparent huge pages, which the host gives where its
    shmem_enabled is `advise` or `always`; "off" does not ask.
    """

    budget_bytes: Bytes = 0
    huge_pages: Literal["auto", "off"] = "auto"


class ImageCache(Section):
    """Images on disk, as they are in host memory: what was built once is read back, not built.

    `directory` is STATE_DIR/images unless given. `budget_bytes` 0, as long as nothing else is said,
    keeps none: it is worth its disk where building costs more than reading (docs/decisions/0004).
    """

    directory: str = ""
    budget_bytes: Bytes = 0


class Worker(Section):
    """What every worker is started with.

    `threads` 0 shares the host's cores among the workers. `memory_bytes` is what a simulated
    partition has; a real one has what its GPU says, of which `workspace_bytes` are left to CUDA and
    to what steps compute in. `page_bytes` 0 is what suits the device: 2 MiB on the host, 64 MiB on
    a GPU. `link_bytes_per_s`, for simulated partitions, 0 does not throttle copies.
    `parking_bytes` is host memory for the KV of paused requests, taken as it is needed.
    """

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    page_bytes: Annotated[int, Field(ge=0, le=1 << 30), AfterValidator(_page)] = 0
    workspace_bytes: Annotated[int, Field(ge=1 << 30, le=1 << 46)] = 3 << 30
    memory_bytes: Annotated[int, Field(ge=16 << 20, le=1 << 46)] = 1 << 30
    step_tokens: Annotated[int, Field(ge=16, le=1 << 20)] = 512
    running_requests_max: Count = 64
    waiting_requests_max: Count = 1024
    context_tokens_max: Annotated[int, Field(ge=16, le=1 << 24)] = 8192
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    link_bytes_per_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    parking_bytes: Bytes = 1 << 30


class Scheduling(Section):
    """Who is ACTIVE when. `max_active_models` is per partition; 0 is as many as fit.

    `in_flight` and `drain_timeout_s` are what swaps do where the caller does not say. A short drain
    is enough: what it does not finish is preserved.
    """

    max_active_models: Annotated[int, Field(ge=0, le=1024)] = 0
    swap_on_demand: bool = True
    min_residency_s: Seconds = 1.0
    hold_timeout_s: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 60.0
    in_flight: Annotated[InFlight, Field(strict=False)] = InFlight.DRAIN
    drain_timeout_s: Seconds = 1.0


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
    worker: Worker = Worker()
    scheduling: Scheduling = Scheduling()
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
    def control_socket(self) -> Path:
        """Where the control API listens."""
        return self.runtime_dir / "control.sock"


def load(
    path: Path | None,
    overrides: Mapping[str, str],
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """Read `path` (None: defaults), let `overrides` (keys of [node]) win, fill in what is derived.

    Raises ConfigInvalid with one line for each mistake.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigInvalid(f"cannot read the configuration {path}: {error}") from error
    node = values.setdefault("node", {})
    if isinstance(node, dict):
        node.update({key: value for key, value in overrides.items() if value})
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        source = str(path) if path is not None else "the command line"
        raise ConfigInvalid(f"{source} is refused:\n" + "\n".join(_explain(error))) from None
    return _complete(config, environment)


def as_toml(config: Config) -> str:
    """A configuration as the file that would give it, every key in its table."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            # JSON's strings, numbers and booleans are TOML's as well.
            keys = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
            lines += [f"[{section}]", *keys, ""]
        elif values:
            lines.insert(0, f"{section} = {json.dumps(values)}")
    return "\n".join(lines)


def _complete(config: Config, environment: Mapping[str, str]) -> Config:
    node = config.node
    root = os.geteuid() == 0
    home = Path(environment.get("HOME", "/"))
    runtime = node.runtime_dir or environment.get("RUNTIME_DIRECTORY", "")
    if not runtime:
        base = environment.get("XDG_RUNTIME_DIR", "")
        if not root and not base:
            raise ConfigInvalid("XDG_RUNTIME_DIR is not set: give --runtime-dir DIR")
        runtime = "/run/hotbay" if root else f"{base}/hotbay"
    state = node.state_dir or environment.get("STATE_DIRECTORY", "")
    if not state:
        base = environment.get("XDG_STATE_HOME", str(home / ".local/state"))
        state = "/var/lib/hotbay" if root else f"{base}/hotbay"
    repository = str(Path(node.repository).absolute()) if node.repository else ""
    if repository and not Path(repository).is_dir():
        raise ConfigInvalid(f"the repository {repository} is not a directory")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    node = node.model_copy(
        update={
            "runtime_dir": str(Path(runtime).absolute()),
            "state_dir": str(Path(state).absolute()),
            "repository": repository,
        }
    )
    budget_bytes = config.host_store.budget_bytes or memory // 2
    store = config.host_store.model_copy(update={"budget_bytes": budget_bytes})
    images = Path(config.image_cache.directory or Path(node.state_dir) / "images").absolute()
    cache = config.image_cache.model_copy(update={"directory": str(images)})
    failpoints = environment.get("HOTBAY_FAILPOINTS", "") or config.failpoints
    return config.model_copy(
        update={
            "node": node,
            "host_store": store,
            "image_cache": cache,
            "failpoints": failpoints,
        }
    )


def _explain(error: ValidationError) -> list[str]:
    """One line for each mistake: where, what, and the nearest known key for an unknown one."""
    lines = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            known = list(Config.model_fields)
            if len(place) > 1:
                section = Config.model_fields[place[0]].annotation
                known = list(section.model_fields) if section is not None else []
            near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(known)}"
            where = f" in [{place[0]}]" if len(place) > 1 else ""
            lines.append(f"  unknown key `{place[-1]}`{where}{hint}")
        else:
            key = f"[{place[0]}] {'.'.join(place[1:])}".rstrip()
            lines.append(f"  {key}: {item['msg']} (given: {item['input']!r})")
    return lines
