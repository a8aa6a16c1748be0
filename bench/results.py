"""What every benchmark's result looks like, on disk and in the terminal.

A result is JSON: what was measured, when, on which machine, with which versions and sizes, and its
figures, each with the bound it was held against in the same run. Absolute times of shared machines
mean little; a figure's ratio to a limit or a peer measured beside it is what is quoted.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

PACKAGES = ("hotbay", "torch", "cuda-bindings", "transformers", "safetensors", "grpcio", "uvicorn")


@dataclass(frozen=True)
class Figure:
    """One line of a result. `met` is None for a figure that has no bound."""

    what: str
    measured: str
    reach: str = ""
    met: bool | None = None


def machine() -> dict[str, Any]:
    """The machine in words and numbers."""
    model = platform.machine()
    with open("/proc/cpuinfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "gpu": gpu(),
    }


def gpu() -> str | None:
    """The first GPU's name and driver; None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        return f"{name}, driver {pynvml.nvmlSystemGetDriverVersion()}"
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter here and are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def report(
    name: str,
    figures: Sequence[Figure],
    *,
    parameters: dict[str, Any],
    measurements: dict[str, Any],
    output: Path | None,
) -> bool:
    """Print a result as a table, write it to `output`, and say whether every bound was met."""
    table = Table(title=name, title_justify="left")
    for heading in ("figure", "measured", "reach", "met"):
        table.add_column(heading)
    for figure in figures:
        met = {None: "", True: "yes", False: "no"}[figure.met]
        table.add_row(figure.what, figure.measured, figure.reach, met)
    Console().print(table)
    if output is not None:
        result = {
            "name": name,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": machine(),
            "versions": versions(),
            "parameters": parameters,
            "figures": [asdict(figure) for figure in figures],
            "measurements": measurements,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return all(figure.met is not False for figure in figures)
