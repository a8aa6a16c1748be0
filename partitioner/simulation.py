"""What `--simulate` means: a board name with a count, or a YAML file that describes a node.

It owns the reading and checking of that argument and the frozen description that comes of it. It
never builds or installs anything: `partitioner.simulated` does that from the description. The
invariant: every GPU of a description names a board that exists and asks nothing the board lacks.

A file looks like this (`boards` may add boards of one's own, in the catalogue's form; GPUs with the
same `pcie_root` share the way to the host's memory, those without one share it with nobody):

    version: 1
    gpus:
      - {board: h200, count: 2, numa_node: 0, pcie_root: 0}
      - {board: a100-80, mig_enabled: true, instances: [{profile: 3g.40gb, start: 4}]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from partitioner.catalogue import Board, Catalogue, load_catalogue
from partitioner.errors import DocumentError, SimulationError, UnknownBoardError
from partitioner.geometry import Geometry, Instance, geometry_of
from partitioner.strict_yaml import KeyPath, StrictModel, nearest, parse_located, read_document

MAX_SIMULATED_GPUS = 16
MAX_PROCESSES_PER_GPU = 64
DEFAULT_DRIVER_VERSION = "580.95.05"
DEFAULT_CUDA_VERSION = 13000

_NAME_AND_COUNT = re.compile(r"(?P<name>.+?)(?:[xX](?P<count>[0-9]{1,6}))?")


class ProcessSpec(StrictModel):
    """A process that holds memory on the GPU: a foreign tenant, as the driver would list it.

    `on` names the instance that it uses, such as `3g.71gb@4`; empty for the whole GPU. One with
    `mps` is in the driver's list of MPS clients instead.
    """

    pid: Annotated[int, Field(gt=0, le=1 << 22)]
    memory_mib: Annotated[int, Field(ge=0)]
    on: Annotated[str, Field(max_length=80)] = ""
    mps: bool = False


class InstanceSpec(StrictModel):
    """A GPU instance that exists when the node starts, with one compute instance over all of it."""

    profile: Annotated[str, Field(min_length=1, max_length=64)]
    start: Annotated[int, Field(ge=0, lt=64)]


class _GpuEntry(StrictModel):
    board: str
    count: Annotated[int, Field(ge=1, le=MAX_SIMULATED_GPUS)] = 1
    numa_node: Annotated[int, Field(ge=0, lt=64)] | None = None
    pcie_root: Annotated[int, Field(ge=0, lt=64)] | None = None
    mig_enabled: bool = False
    processes: Annotated[tuple[ProcessSpec, ...], Field(max_length=MAX_PROCESSES_PER_GPU)] = ()
    instances: Annotated[tuple[InstanceSpec, ...], Field(max_length=64)] = ()


class _SimulationFile(StrictModel):
    version: Literal[1]
    driver_version: Annotated[str, Field(min_length=1, max_length=79)] = DEFAULT_DRIVER_VERSION
    cuda_version: Annotated[int, Field(ge=11000)] = DEFAULT_CUDA_VERSION
    boards: dict[str, Board] = Field(default_factory=dict)
    gpus: Annotated[tuple[_GpuEntry, ...], Field(min_length=1, max_length=MAX_SIMULATED_GPUS)]


@dataclass(frozen=True)
class GpuSpec:
    """One simulated GPU."""

    board_key: str
    board: Board
    numa_node: int | None = None
    pcie_root: int | None = None
    mig_enabled: bool = False
    processes: tuple[ProcessSpec, ...] = ()
    instances: tuple[Instance, ...] = ()


@dataclass(frozen=True)
class NodeSpec:
    """One simulated node. `cuda_version` is NVML's number: 1000 x major + 10 x minor."""

    gpus: tuple[GpuSpec, ...]
    driver_version: str = DEFAULT_DRIVER_VERSION
    cuda_version: int = DEFAULT_CUDA_VERSION


def parse_simulate(argument: str, catalogue: Catalogue | None = None) -> NodeSpec:
    """Turn the argument of `--simulate` into a description of a node.

    Raises `SimulationError` for a bad `BOARDxCOUNT`, `DocumentError` with the line for a bad file.
    """
    known = catalogue if catalogue is not None else load_catalogue()
    if argument.endswith((".yaml", ".yml")) or "/" in argument:
        return parse_node(read_document(Path(argument)), argument, known)
    match = _NAME_AND_COUNT.fullmatch(argument.strip())
    if match is None:
        raise SimulationError(
            "--simulate wants a board and a count, such as h200x1, or the path of a YAML file"
        )
    count = int(match["count"] or 1)
    try:
        key = known.resolve(match["name"])
    except UnknownBoardError as error:
        raise SimulationError(f"--simulate {argument}: {error}") from error
    if not 1 <= count <= MAX_SIMULATED_GPUS:
        raise SimulationError(
            f"--simulate {argument}: {count} GPUs; a simulated node has 1 to {MAX_SIMULATED_GPUS}"
        )
    return NodeSpec(gpus=(GpuSpec(key, known.boards[key]),) * count)


def parse_node(text: str, source: str, catalogue: Catalogue) -> NodeSpec:
    """Read the text of a node file; raises `DocumentError` with the line that must change."""
    file, lines = parse_located(_SimulationFile, text, source)
    known = catalogue.with_boards({key.lower(): board for key, board in file.boards.items()})
    gpus: list[GpuSpec] = []
    for index, entry in enumerate(file.gpus):
        gpus.extend([_gpu_spec(entry, ("gpus", index), known, lines, source)] * entry.count)
    if len(gpus) > MAX_SIMULATED_GPUS:
        problem = f"{len(gpus)} GPUs in all; a simulated node has at most {MAX_SIMULATED_GPUS}"
        raise DocumentError(source, lines[("gpus",)], problem)
    return NodeSpec(tuple(gpus), file.driver_version, file.cuda_version)


def _gpu_spec(
    entry: _GpuEntry,
    path: KeyPath,
    known: Catalogue,
    lines: Mapping[KeyPath, int],
    source: str,
) -> GpuSpec:
    """Check what one entry asks against the board that it names."""
    try:
        key = known.resolve(entry.board)
    except UnknownBoardError as error:
        raise DocumentError(source, lines[(*path, "board")], str(error)) from error
    board = known.boards[key]
    if entry.mig_enabled and not board.mig_capable:
        problem = f"mig_enabled: the board {key} has no MIG profiles"
        raise DocumentError(source, lines[(*path, "mig_enabled")], problem)
    held_mib = sum(process.memory_mib for process in entry.processes)
    room_mib = board.memory_mib - board.reserved_mib
    if held_mib > room_mib:
        problem = f"processes hold {held_mib} MiB; the board {key} has {room_mib} MiB for them"
        raise DocumentError(source, lines[(*path, "processes")], problem)
    instances = _instances(entry, path, geometry_of(board), lines, source)
    places = {str(each) for each in instances}
    for process in entry.processes:
        if process.on and process.on not in places:
            problem = f"processes: there is no instance {process.on!r} for pid {process.pid}"
            raise DocumentError(source, lines[(*path, "processes")], problem)
    return GpuSpec(
        key,
        board,
        entry.numa_node,
        entry.pcie_root,
        entry.mig_enabled,
        entry.processes,
        instances,
    )


def _instances(
    entry: _GpuEntry,
    path: KeyPath,
    geometry: Geometry,
    lines: Mapping[KeyPath, int],
    source: str,
) -> tuple[Instance, ...]:
    """The instances of an entry; refused at the line of the first that cannot be there."""
    if entry.instances and not entry.mig_enabled:
        problem = "instances: there are none without mig_enabled: true"
        raise DocumentError(source, lines[(*path, "instances")], problem)
    placed: list[Instance] = []
    for index, each in enumerate(entry.instances):
        line = lines[(*path, "instances", index)]
        profile = geometry.by_name.get(each.profile)
        if profile is None:
            hint = nearest(each.profile, geometry.by_name)
            problem = f"the board {entry.board} has no profile {each.profile!r}{hint}"
            raise DocumentError(source, line, problem)
        placed.append(Instance(each.start, profile.slots, each.profile))
        problem = geometry.problem(placed)
        if problem:
            raise DocumentError(source, line, f"instances: {problem}")
    return tuple(sorted(placed))
