"""What a simulated node remembers while the program that plays it is away, as real boards do.

It owns one small file with MIG modes and instances. It keeps nothing else: memory, processes and
injected trouble go with the process. The invariants: the file is replaced whole; a file that is
damaged, or of other boards, is the same as none. It belongs into a directory that a reboot empties,
since instances do not outlive one.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from partitioner.geometry import Instance, geometry_of
from partitioner.simulated.node import SimulatedGpu, SimulatedNode
from partitioner.simulation import NodeSpec

FILE_NAME = "simulated-node.json"
FILE_BYTES_MAX = 1 << 20

log = logging.getLogger(__name__)


def remembering(spec: NodeSpec, path: Path) -> SimulatedNode:
    """The described node as it was left according to `path`; its changes are written there."""
    node = SimulatedNode(spec, changed=lambda changed: save(changed, path))
    try:
        if path.exists() and path.stat().st_size <= FILE_BYTES_MAX:
            _restore(node, json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the simulated node starts as it is described: %s: %s", path, error)
    return node


def save(node: SimulatedNode, path: Path) -> None:
    """Write how the node is cut; at every point in time the file is an old or a new one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"version": 1, "gpus": [_as_json(gpu) for gpu in node.gpus]}))
    os.replace(fresh, path)


def _as_json(gpu: SimulatedGpu) -> dict[str, Any]:
    instances = [
        [each.number, each.place.profile, each.place.start, each.place.size, each.complete]
        for each in gpu.instances
    ]
    mode = [gpu.mig_current, gpu.mig_pending]
    return {"uuid": gpu.uuid, "mode": mode, "instances": instances}


def _restore(node: SimulatedNode, kept: dict[str, Any]) -> None:
    """Take over what fits the boards that are described now; all of it or nothing."""
    found = {each["uuid"]: each for each in kept["gpus"]}
    if kept["version"] != 1 or set(found) != {gpu.uuid for gpu in node.gpus}:
        raise ValueError("it was left by a node with other boards")
    read = []
    for gpu in node.gpus:
        instances = tuple(
            node.make_instance(gpu, number, Instance(start, size, profile), complete)
            for number, profile, start, size, complete in found[gpu.uuid]["instances"]
        )
        problem = geometry_of(gpu.board).problem(each.place for each in instances)
        if problem:
            raise ValueError(problem)
        current, pending = found[gpu.uuid]["mode"]
        read.append((gpu, bool(current), bool(pending), instances))
    for gpu, current, pending, instances in read:
        gpu.mig_current, gpu.mig_pending, gpu.instances = current, pending, instances
