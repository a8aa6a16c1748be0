"""What a worker is started with: the arguments of its command line, checked.

Owns the arguments, their ranges and the paths that follow from them. It never reads a file or the
environment. Invariant: an `Options` that exists is in range.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.limits import STRICT_STEP_TOKENS_MAX
from engine.link.directories import SOCKET_PATH_BYTES_MAX, worker_directory
from engine.worker.errors import OptionInvalid
from engine.worker.failpoints import FailPoint, Trigger, parse_failpoints
from swap.shared_link import SWAP_WAIT_S_MAX

HOST_PAGE_BYTES = 2 << 20
CUDA_PAGE_BYTES = 64 << 20
WORKSPACE_BYTES = 3 << 30
STEP_TOKENS = 512
PARKING_BYTES = 1 << 30


@dataclass(frozen=True)
class Options:
    """One worker's arguments. Sizes in bytes, rates in bytes per second."""

    partition: str
    runtime_dir: Path
    generation: int
    memory_bytes: int
    page_bytes: int = HOST_PAGE_BYTES
    device: Literal["host", "cuda"] = "host"
    gpu: str = ""
    """UUID of the GPU, or of its MIG instance; empty: the first that is visible."""
    workspace_bytes: int = 0
    """Part of `memory_bytes` that is left to the CUDA context and to what steps compute in."""
    keep_mappings: bool = True
    """On a GPU, leave pages mapped where they were, so that a model's return maps nothing."""
    threads: int = 1
    link_bytes_per_s: float | None = None
    """Throttle of the link; None: as fast as it goes."""
    link: str = ""
    """Name of the link, where other workers share it; empty: nobody does."""
    link_wait_s: float = SWAP_WAIT_S_MAX
    """How long a swap waits for its turn at a shared link before it copies beside others."""
    step_tokens: int = STEP_TOKENS
    """Tokens of prompts and decodes that one engine step computes at most."""
    prefix_cache: bool = True
    """Whether KV of prompts is kept for others that begin with the same tokens."""
    strict: bool = False
    """Whether results are the same bit for bit whatever else is in a batch."""
    parking_bytes: int = PARKING_BYTES
    """Host memory that KV of paused requests is parked in at most; 0 has it computed again."""
    must_be_pinned: bool = False
    """Refuse images that the system does not let be pinned, instead of copying them slowly."""
    stage_timeout_s: float = 30.0
    """Longest that one stage of an exchange may take, draining apart."""
    failpoints: Mapping[FailPoint, Trigger] = field(default_factory=dict)

    @property
    def pool_bytes(self) -> int:
        """What weights and KV share."""
        return self.memory_bytes - self.workspace_bytes

    @property
    def directory(self) -> Path:
        return worker_directory(self.runtime_dir, self.partition)

    @property
    def link_file(self) -> Path:
        """Where turns at the link are taken."""
        return self.runtime_dir / "links" / self.link

    @property
    def control_socket(self) -> Path:
        return self.directory / "control.sock"

    @property
    def tokens_socket(self) -> Path:
        return self.directory / "tokens.sock"


def parse_options(arguments: Sequence[str]) -> Options:
    """Read the command line. Raises OptionInvalid; argparse itself exits on unknown arguments."""
    parser = argparse.ArgumentParser(prog="hotbay-worker", allow_abbrev=False)
    parser.add_argument("--partition", required=True)
    parser.add_argument("--runtime-dir", type=Path, required=True)
    parser.add_argument("--generation", type=int, required=True)
    parser.add_argument("--device", choices=["host", "cuda"], default="host")
    parser.add_argument("--gpu", default="")
    parser.add_argument("--workspace-bytes", type=int)
    parser.add_argument("--keep-mappings", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--page-bytes", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--link-bytes-per-s", type=float)
    parser.add_argument("--link", default="")
    parser.add_argument("--link-wait-s", type=float, default=SWAP_WAIT_S_MAX)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--prefix-cache", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--parking-bytes", type=int, default=PARKING_BYTES)
    parser.add_argument("--must-be-pinned", action="store_true")
    parser.add_argument("--stage-timeout-s", type=float, default=30.0)
    parser.add_argument("--failpoints", type=parse_failpoints, default={}, help=argparse.SUPPRESS)
    values = vars(parser.parse_args(arguments))
    cuda = values["device"] == "cuda"
    if values["page_bytes"] is None:
        values["page_bytes"] = CUDA_PAGE_BYTES if cuda else HOST_PAGE_BYTES
    if values["workspace_bytes"] is None:
        values["workspace_bytes"] = WORKSPACE_BYTES if cuda else 0
    options = Options(**values)
    _check(options)
    return options


def _check(options: Options) -> None:
    # An instance is named below its GPU: gpu0/3g.71gb@4.
    if any(not part or part.startswith(".") for part in options.partition.split("/")):
        raise OptionInvalid(f"--partition {options.partition!r} is no name of a directory")
    if "/" in options.link or options.link.startswith("."):
        raise OptionInvalid(f"--link {options.link!r} is no name of a file")
    for path in (options.control_socket, options.tokens_socket):
        if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
            raise OptionInvalid(
                f"{path} is longer than {SOCKET_PATH_BYTES_MAX} bytes, the longest path of a Unix "
                "socket: use a shorter --runtime-dir"
            )
    ranges: tuple[tuple[str, float, float], ...] = (
        ("generation", options.generation, 0),
        ("page-bytes", options.page_bytes, HOST_PAGE_BYTES),
        ("workspace-bytes", options.workspace_bytes, 0),
        ("memory-bytes", options.memory_bytes, options.page_bytes + options.workspace_bytes),
        ("threads", options.threads, 1),
        ("link-wait-s", options.link_wait_s, 0),
        ("step-tokens", options.step_tokens, 1),
        ("parking-bytes", options.parking_bytes, 0),
        ("stage-timeout-s", options.stage_timeout_s, 0.001),
    )
    for name, value, minimum in ranges:
        if not value >= minimum:
            raise OptionInvalid(f"--{name} is {value:g}; it must be at least {minimum:g}")
    if options.page_bytes % HOST_PAGE_BYTES:
        raise OptionInvalid(
            f"--page-bytes is {options.page_bytes}; it must be a multiple of {HOST_PAGE_BYTES}"
        )
    if options.strict and options.step_tokens > STRICT_STEP_TOKENS_MAX:
        raise OptionInvalid(
            f"--step-tokens is {options.step_tokens}; with --strict it must be at most "
            f"{STRICT_STEP_TOKENS_MAX}"
        )
    if options.device == "cuda" and options.link_bytes_per_s is not None:
        raise OptionInvalid("--link-bytes-per-s throttles the host device's link, not a GPU's")
    if options.device == "host" and options.gpu:
        raise OptionInvalid(f"--gpu {options.gpu} is for --device cuda")
    if options.link_bytes_per_s is not None and not options.link_bytes_per_s > 0:
        raise OptionInvalid("--link-bytes-per-s must be above 0; leave it out for no throttle")
