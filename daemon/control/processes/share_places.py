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

FIRST_NAMED_DRIVER = 615
"""The first release whose control program knows namespaces; for simulated nodes only."""


def share_places(config: Config, gpus: tuple[Gpu, ...]) -> MpsPlaces:
    """The places that may be shared on this node, with its programs."""
    return MpsPlaces(config.runtime_dir / "mps", _programs(config, gpus), boot_id())


def _programs(config: Config, gpus: tuple[Gpu, ...]) -> Programs:
    if not config.node.simulate:
        return Programs(look=(sys.executable, "-m", "swap.share_probe"))
    release = gpus[0].driver_version.partition(".")[0] if gpus else ""
    newest = "3" if release.isdigit() and int(release) >= FIRST_NAMED_DRIVER else "2"
    client = (sys.executable, "-m", "partitioner.simulated.mps_client")
    control = (sys.executable, "-m", "partitioner.simulated.mps_control", "--newest", newest)
    return Programs(look=client, control=control, prefix=(*client, "--"))
