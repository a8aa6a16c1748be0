"""Which programs make and test MPS shares: NVIDIA's on GPUs, the stand-ins on a simulated node.

It owns the choice. It runs none of them. The invariant: a simulated node has the control program
that a driver of its version would bring.
"""

from __future__ import annotations

import sys

from daemon.control.config import Config
from daemon.control.notify import boot_id
from partitioner.gpu import Gpu
from partitioner.mps.places import MpsPlaces, Programs
from partitioner.mps.static import FIRST_DRIVER, FIRST_VERSION, chunk_of

FIRST_NAMED_DRIVER = 615
"""The first release whose control program knows namespaces; for simulated nodes only."""


def share_places(config: Config, gpus: tuple[Gpu, ...]) -> MpsPlaces:
    """The places that may be shared on this node, with its programs."""
    return MpsPlaces(config.runtime_dir / "mps", _programs(config, gpus), boot_id())


def _programs(config: Config, gpus: tuple[Gpu, ...]) -> Programs:
    if not config.node.simulate:
        return Programs(look=(sys.executable, "-m", "swap.share_probe"))
    release = gpus[0].driver_version.partition(".")[0] if gpus else ""
    number = int(release) if release.isdigit() else 0
    newest = "3" if number >= FIRST_NAMED_DRIVER else "2"
    version = FIRST_VERSION if number >= FIRST_DRIVER else FIRST_VERSION - 10
    devices = (
        ("--multiprocessors", f"{gpu.uuid}={gpu.sm_count}/{chunk_of(gpu.compute_capability)}")
        for gpu in gpus
        if chunk_of(gpu.compute_capability)
    )
    client = (sys.executable, "-m", "partitioner.simulated.mps_client")
    control = (
        *(sys.executable, "-m", "partitioner.simulated.mps_control"),
        *("--newest", newest, "--version", str(version)),
        *(word for pair in devices for word in pair),
    )
    return Programs(look=client, control=control, prefix=(*client, "--"))
