"""Compiles every kernel to machine code without a GPU, and keeps what each takes.

    python -m engine.kernels.triton.compile            # write the table and the page anew
    python -m engine.kernels.triton.compile --check    # compare; exit 1 when something differs

Owns `resources.json` beside it and docs/kernels.md, which is rendered from it. It never runs a
kernel. Invariant: an entry names the source it was measured on by its fingerprint, so a kernel
that changed and was not measured again is found without compiling.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.triton.variants import Variant, all_variants

TABLE_PATH = Path(__file__).with_name("resources.json")
PAGE_PATH = Path(__file__).resolve().parents[3] / "docs" / "kernels.md"
WARP_THREADS = 32
COMPILERS_MAX = 2
"""Variants compiled at once; most of the time goes to ptxas, a process of its own."""
INTRODUCTION = """# Kernels

Every Triton kernel in the configurations that the engine uses, compiled by Triton {version} for
three generations of GPU. Registers are per thread, shared memory per program; a stack means that
registers were spilled, which no hot kernel may do. What a kernel computes, its shapes, grid and
bytes are in its docstring under `engine/kernels/triton/`. This page is written by `scripts/kernels`
and held by a test.

| kernel | GPU | warps | stages | registers | shared, bytes | stack, bytes |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True)
class Resources:
    """What one variant takes on one generation of GPU."""

    registers: int
    """Of each thread."""
    shared_bytes: int
    """Of each program; what Triton asks for at launch included."""
    stack_bytes: int
    """Of each thread, in local memory: registers that were spilled."""


def measure(variant: Variant, target: int) -> Resources:
    """Compile for compute capability `target`, as 90 for 9.0."""
    order = variant.kernel.arg_names
    signature = dict.fromkeys(order, "constexpr")
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, kind in variant.signature.items():
        signature[name], _, divisible = kind.partition(":")
        if divisible:
            attributes[(order.index(name),)] = [["tt.divisibility", int(divisible)]]
    missing = set(order) - set(variant.signature) - set(variant.constexprs)
    if missing:
        raise ValueError(f"{variant.label} leaves out {', '.join(sorted(missing))}")
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attributes)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fuses,
    }
    if variant.maxnreg is not None:
        options["maxnreg"] = variant.maxnreg
    compiled = triton.compile(source, GPUTarget("cuda", target, WARP_THREADS), options)
    registers, stack_bytes = _usage(compiled.asm["cubin"])
    return Resources(registers, compiled.metadata.shared, stack_bytes)


def measured(variants: Sequence[Variant]) -> dict[str, Any]:
    """The table: fingerprint and resources per generation for each variant."""
    jobs = [(variant, target) for variant in variants for target in variant.targets]
    with ThreadPoolExecutor(COMPILERS_MAX) as pool:
        results = pool.map(lambda job: measure(*job), jobs)
    table: dict[str, Any] = {}
    for (variant, target), result in zip(jobs, results, strict=True):
        entry = table.setdefault(variant.label, described(variant))
        entry[f"sm_{target}"] = asdict(result)
    return {"triton": triton.__version__, "variants": table}


def described(variant: Variant) -> dict[str, Any]:
    """What an entry says besides resources."""
    return {
        "fingerprint": variant.fingerprint(triton.__version__),
        "hot": variant.hot,
        "warps": variant.num_warps,
        "stages": variant.num_stages,
    }


def render(table: dict[str, Any]) -> str:
    """The page of a table."""
    lines = []
    for label, entry in table["variants"].items():
        for target in sorted((key for key in entry if key.startswith("sm_")), key=_capability):
            own = entry[target]
            cells = [label, target, entry["warps"], entry["stages"], *own.values()]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |\n")
    return INTRODUCTION.format(version=table["triton"]) + "".join(lines)


def read_table() -> dict[str, Any]:
    """The committed table."""
    table: dict[str, Any] = json.loads(TABLE_PATH.read_text(encoding="utf-8"))
    return table


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed between two tables, a line each."""
    lines = []
    old, new = before["variants"], after["variants"]
    for label in sorted(old.keys() | new.keys()):
        if label not in old or label not in new:
            lines.append(f"{label}: {'new' if label in new else 'gone'}")
            continue
        for key in sorted(old[label].keys() | new[label].keys()):
            was, now = old[label].get(key), new[label].get(key)
            if was != now:
                lines.append(f"{label}, {key}: {was} -> {now}")
    return lines


def spilling(table: dict[str, Any]) -> list[str]:
    """Hot variants that spill, and where."""
    return [
        f"{label} on {target}: {own['stack_bytes']} bytes"
        for label, entry in table["variants"].items()
        for target, own in entry.items()
        if entry["hot"] and target.startswith("sm_") and own["stack_bytes"]
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure everything; write the table, or compare with it. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile the kernels and keep what they take.")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args(arguments).check
    table = measured(all_variants())
    empty: dict[str, Any] = {"triton": triton.__version__, "variants": {}}
    changes = differences(read_table() if TABLE_PATH.exists() else empty, table)
    spills = spilling(table)
    for line in [*changes, *(f"spills: {line}" for line in spills)]:
        print(line)
    if not check:
        TABLE_PATH.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        PAGE_PATH.write_text(render(table), encoding="utf-8")
    print(f"{len(table['variants'])} variants, {len(changes)} changes, {len(spills)} spill")
    return 1 if spills or (check and changes) else 0


def _capability(target: str) -> int:
    return int(target.removeprefix("sm_"))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as the reader that Triton brings finds them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report)
    if found is None:
        raise ValueError(f"cuobjdump reports no resources: {report[:200]}")
    registers, stack, local = (int(number) for number in found.groups())
    return registers, stack + local


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
