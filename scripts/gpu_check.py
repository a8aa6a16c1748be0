"""Runs the parts that need a GPU, most valuable first, each under ten minutes; ends with a table.

A part is a command and a time limit. What it prints goes to a log, how it ended to a JSON file in
the output directory; a part that has passed there before is not run again, so that a check that was
cut short goes on where it stopped. Parts only read the GPU's settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PART_TIMEOUT_S_MAX = 600


@dataclass(frozen=True)
class Part:
    """One thing to check. `command` runs in the repository with this Python."""

    name: str
    what: str
    command: tuple[str, ...]
    timeout_s: int = PART_TIMEOUT_S_MAX


PARTS = (
    Part(
        "contract",
        "device memory over the real driver keeps the contract",
        ("-m", "pytest", "-m", "gpu", "tests/swap/test_device_contract.py"),
        300,
    ),
    Part(
        "tokens",
        "engines on the GPU: transformers' tokens, and the same ones after 20 swaps",
        ("-m", "pytest", "-m", "gpu", "tests/gpu"),
    ),
    Part(
        "costs",
        "copies, handles, mappings and pinning by size",
        ("-m", "bench.device_costs", "--output", "bench/results/gpu-device-costs.json"),
    ),
    Part(
        "swap-1b",
        "swaps of 1B models in bf16 against the link's rate",
        (
            *("-m", "bench.swap", "--device", "cuda", "--model", "1B"),
            *("--output", "bench/results/gpu-swap-1b.json"),
        ),
    ),
    Part(
        "swap-8b",
        "swaps of 8B models in bf16 against the link's rate",
        (
            *("-m", "bench.swap", "--device", "cuda", "--model", "8B"),
            *("--output", "bench/results/gpu-swap-8b.json"),
        ),
    ),
    Part(
        "nvml",
        "the driver's NVML passes the contract that the simulated one passes (read only)",
        ("-m", "pytest", "-m", "gpu", "tests/partitioner"),
        120,
    ),
    Part(
        "engine",
        "the engine's parity with transformers, on the host device",
        ("-m", "pytest", "tests/engine"),
    ),
    Part(
        "swap",
        "swaps on the host device beside a plain copy",
        ("-m", "bench.swap", "--output", "bench/results/gpu-host-swap.json"),
    ),
)


def run(part: Part, output: Path) -> dict[str, object]:
    """Run a part, unless it has passed already; returns its record."""
    record_path = output / f"{part.name}.json"
    if record_path.exists():
        record: dict[str, object] = json.loads(record_path.read_text(encoding="utf-8"))
        if record["outcome"] == "passed":
            return {**record, "outcome": "passed before"}
    started_s = time.monotonic()
    with (output / f"{part.name}.log").open("wb") as log:
        try:
            done = subprocess.run(
                [sys.executable, *part.command],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=part.timeout_s,
            )
            outcome = "passed" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {part.timeout_s} s"
    record = {
        "part": part.name,
        "what": part.what,
        "outcome": outcome,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/gpu-check"))
    parser.add_argument("--only", nargs="*", choices=[part.name for part in PARTS])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = []
    for part in PARTS:
        if not arguments.only or part.name in arguments.only:
            print(f"{part.name}: {part.what}", flush=True)
            records.append(run(part, arguments.output))
    print()
    for record in records:
        print(f"{record['part']:<10} {record['outcome']:<22} {record['seconds']:>7} s")
    return 0 if all(str(record["outcome"]).startswith("passed") for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
