"""Runs the parts that need a GPU, most valuable first, each under ten minutes; ends with a table.

    scripts/gpu-check [--wheels DIR] [--only NAME ...]     on a machine with a GPU
    scripts/gpu-check --fake                               without one: do the benchmarks run?

A part is a command and a time limit. What it prints goes to a log, how it ended to a JSON file in
the output directory; a part that has passed there before is not run again, so that a check that was
cut short goes on where it stopped. A part that fails stops no other, and what it leaves running is
ended before the next. Parts only read the GPU's settings. Benchmarks write `bench/results/`, from
which docs/benchmarks.md is rendered; with `--fake` they run in small sizes over a fake driver, and
write to the output directory instead.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PART_TIMEOUT_S_MAX = 600
RESULTS = Path("bench/results")
NEEDED = (
    *("blake3", "cuda.bindings", "hypothesis", "msgspec", "numpy", "psutil", "pydantic", "pynvml"),
    *("pytest", "pytest_timeout", "rich", "safetensors", "tokenizers", "torch", "transformers"),
    *("triton", "yaml"),
)
PR_SET_CHILD_SUBREAPER = 36
END_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Ask:
    """A figure that a part takes, and what it is to reach."""

    figure: str
    reach: str


@dataclass(frozen=True)
class Part:
    """One thing to check. `command` runs in the repository with this Python.

    A part with a `result` is a benchmark: it takes `--output FILE`, and `--fake` for its dry form.
    """

    name: str
    what: str
    command: tuple[str, ...]
    timeout_s: int = PART_TIMEOUT_S_MAX
    result: str = ""
    """Name of its file in bench/results."""
    asks: tuple[Ask, ...] = ()


def swap_part(model: str, what: str, *asks: Ask) -> Part:
    """Swaps of synthetic models of one shape."""
    command = ("-m", "bench.swap", "--device", "cuda", "--model", model)
    name = f"swap-{model.lower()}"
    return Part(name, what, command, result=f"gpu-{name}.json", asks=asks)


def engine_part(name: str, what: str, module: str, model: str, *asks: Ask, more: str = "") -> Part:
    """The engine's speed with random weights of one shape, beside transformers'."""
    command = ("-m", f"bench.{module}", "--device", "cuda", "--model", model, *more.split())
    return Part(name, what, command, result=f"gpu-{name}.json", asks=asks)


FIRST_TOKEN = "swap from STANDBY, {} in bf16, request to first token of a 64-token prompt"
MPS_TESTS = ("tests/partitioner/test_mps_contract.py", "tests/partitioner/test_mps_static.py")
PARTS = (
    Part(
        "contract",
        "device memory over the real driver keeps the contract",
        ("-m", "pytest", "-m", "gpu", "tests/swap/test_device_contract.py"),
        300,
    ),
    Part(
        "tokens",
        "engines on the GPU: transformers' tokens, and the same ones after 20 swaps; graphs",
        ("-m", "pytest", "-m", "gpu", "tests/gpu"),
    ),
    swap_part(
        "8B",
        "swaps of 8B models in bf16 against the link's rate, beside four other ways",
        Ask(FIRST_TOKEN.format("8B"), "at most 1.05 x bytes at the measured pinned rate + 15 ms"),
        Ask("freeing the outgoing model's memory", "at most 10 ms, no byte of weights copied out"),
        Ask("device memory held by a STANDBY model in a worker", "at most 64 MB"),
    ),
    engine_part(
        "decode-8b",
        "decoding of an 8B by batch and context against the memory's rate, beside generate_batch",
        "decode",
        "8B",
        Ask("decode, 8B in bf16, batch 1, context 1,024", "at least 80 % of the memory's rate"),
        Ask("decode, 8B, batch 32 and 128", "at least 75 % of the memory's rate"),
        Ask("a step at context 32,768 over one at 1,024, batch 1", "the bytes' ratio within 10 %"),
    ),
    engine_part(
        "hidden-8b",
        "the host's time between steps of an 8B that the device waits for",
        "hidden",
        "8B",
        Ask("host time between steps that is not hidden, 8B, batch 128", "under 3 % of a step"),
    ),
    engine_part(
        "chats-8b",
        "1,000 chats at once through an 8B, beside generate_batch",
        "offline",
        "8B",
        Ask("tokens/s of 1,000 chats, 8B in bf16", "above 16,215; at least 4 x generate_batch"),
        more="--workload chats",
    ),
    engine_part(
        "first-token-8b",
        "prompts of an 8B to their first token against the measured matmul rate",
        "first_token",
        "8B",
        Ask("prefill of 8,192 tokens, 8B", "at least 60 % of the measured bf16 matmul rate"),
    ),
    Part(
        "preserve-8b",
        "what 32 preserved requests of 2,000 tokens add to a swap of 8B models",
        ("-m", "bench.preserve", "--device", "cuda"),
        result="gpu-preserve-8b.json",
        asks=(
            Ask("preserving 32 requests of 2,000 tokens each, 8B", "adds at most 5 % to the swap"),
        ),
    ),
    Part(
        "packed-8b",
        "swaps to a packed 8B image against its unpacked bytes at the link's rate",
        ("-m", "bench.packed", "--device", "cuda", "--model", "8B"),
        result="gpu-packed-8b.json",
        asks=(
            Ask(
                "swap from STANDBY, 8B in bf16 as a packed image, request to first token",
                "at most 0.80 x the unpacked weights' bytes at the measured pinned rate",
            ),
        ),
    ),
    Part(
        "staged-8b",
        "swaps to STAGED 8B models",
        ("-m", "bench.staged_cuda"),
        result="gpu-staged-8b.json",
        asks=(Ask("swap to STAGED, 8B", "at most 10 ms"),),
    ),
    Part(
        "costs",
        "copies, handles, mappings and pinning by size",
        ("-m", "bench.device_costs"),
        result="gpu-device-costs.json",
    ),
    swap_part(
        "30B",
        "swaps of 30B models in bf16 against the link's rate",
        Ask(FIRST_TOKEN.format("30B"), "at most 1.05 x bytes at the measured pinned rate + 30 ms"),
    ),
    engine_part(
        "decode-1b",
        "decoding of a 1B by batch and context against the memory's rate, beside generate_batch",
        "decode",
        "1B",
        Ask("decode, 1B in bf16, batch 1", "at least 60 % of the memory's rate"),
    ),
    engine_part(
        "uniform-0.6b",
        "256 requests of 100 to 1,024 tokens in and out through a 0.6B, beside generate_batch",
        "offline",
        "0.6B",
        Ask("tokens/s of 256 requests of 100 to 1,024 tokens, 0.6B", "5 x generate_batch"),
        more="--workload uniform",
    ),
    engine_part(
        "together-1b",
        "two 1B engines active at once against one with the same total batch",
        "together",
        "1B",
        Ask("two 1B engines at once over one with the same total batch", "at least 0.9 x"),
    ),
    engine_part(
        "operations-8b", "each operation of an 8B's layer: time, bytes, share", "operations", "8B"
    ),
    engine_part("strict-8b", "what results that are the same bits cost an 8B", "strict", "8B"),
    swap_part("8B-fp8", "an 8B image in fp8 on its way to the GPU, with no engine around it"),
    swap_part("1B", "swaps of 1B models in bf16 against the link's rate"),
    Part(
        "nvml",
        "the driver's NVML passes the contract that the simulated one passes (read only)",
        (
            *("-m", "pytest", "-m", "gpu", "tests/partitioner"),
            *(f"--ignore={path}" for path in MPS_TESTS),
        ),
        120,
    ),
    Part(
        "mps",
        "the driver's MPS control daemon keeps limits (own directories, no mode is changed)",
        ("-m", "pytest", "-m", "gpu", *MPS_TESTS),
        300,
    ),
    Part(
        "engine",
        "the engine's parity with transformers, on the host device",
        ("-m", "pytest", "tests/engine", "--ignore", "tests/engine/test_pull.py"),
    ),
)


def check_needed() -> list[str]:
    """Modules that parts import and that are not to be found."""
    missing = []
    for name in NEEDED:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            missing.append(name)
    return missing


def install(wheels: Path, site: Path) -> None:
    """Put every wheel of a folder beside the packages that are there, for the parts alone.

    Nothing is fetched. A folder of packages is used rather than a virtual environment, since the
    Python that has torch may itself be one, whose packages another would not see.
    """
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"gpu-check: there is no wheel in {wheels}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--upgrade", "--target", str(site), *files], check=True)


def command_of(part: Part, output: Path, fake: bool) -> list[str]:
    """The part's command, with where its result goes."""
    command = list(part.command)
    if part.result:
        command += ["--output", str((output if fake else RESULTS) / part.result)]
        command += ["--fake"] if fake else []
    return command


def run(part: Part, output: Path, fake: bool) -> dict[str, object]:
    """Run a part, unless it has passed already; returns its record."""
    command = command_of(part, output, fake)
    record_path = output / f"{part.name}.record.json"
    if record_path.exists():
        record: dict[str, object] = json.loads(record_path.read_text(encoding="utf-8"))
        if record["outcome"] == "passed" and record["command"] == command:
            return {**record, "outcome": "passed before"}
    started_s = time.monotonic()
    with (output / f"{part.name}.log").open("wb") as log:
        try:
            done = subprocess.run(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=part.timeout_s,
            )
            outcome = "passed" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {part.timeout_s} s"
    left = end_what_is_left()
    record = {
        "part": part.name,
        "what": part.what,
        "command": command,
        "outcome": outcome,
        "left_running": left,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def adopt_orphans() -> None:
    """Become the parent of what a part leaves: a worker outlives whoever started it."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_what_is_left() -> int:
    """End processes that a part started and did not end; returns how many."""
    import psutil

    left = psutil.Process().children(recursive=True)
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=END_TIMEOUT_S)
    return len(left)


def prepare(wheels: Path | None, output: Path) -> None:
    """Have this process and the parts find the carried packages; refuse what cannot work."""
    site = output.absolute() / "site"
    if wheels is not None:
        install(wheels, site)
    if site.exists():
        sys.path.insert(0, str(site))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
        importlib.invalidate_caches()
    missing = check_needed()
    if missing:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SystemExit(
            f"gpu-check: {sys.executable} has no {', '.join(missing)}. Install what pyproject.toml "
            "names; without a network, on another machine: pip download --only-binary=:all: "
            f"--python-version {version} --platform manylinux_2_28_x86_64 -d DIR PACKAGE ...; "
            "then here: scripts/gpu-check --wheels DIR"
        )
    adopt_orphans()


def main(arguments: list[str] | None = None, parts: tuple[Part, ...] = PARTS) -> int:
    """Run parts; the exit status says whether all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", choices=[part.name for part in parts])
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use besides")
    parser.add_argument("--fake", action="store_true", help="dry run of the benchmarks, no GPU")
    values = parser.parse_args(arguments)
    output = values.output or Path("build/gpu-check-fake" if values.fake else "build/gpu-check")
    output.mkdir(parents=True, exist_ok=True)
    prepare(values.wheels, output)
    records = []
    for part in parts:
        if (values.only and part.name not in values.only) or (values.fake and not part.result):
            continue
        print(f"{part.name}: {part.what}", flush=True)
        records.append(run(part, output, values.fake))
    print()
    for record in records:
        print(f"{record['part']:<12} {record['outcome']:<22} {record['seconds']:>7} s")
    print(f"\nLogs are in {output}; render the figures with: python -m bench.render")
    return 0 if all(str(record["outcome"]).startswith("passed") for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
