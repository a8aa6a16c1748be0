"""Renders docs/benchmarks.md from bench/results/*.json: `python -m bench.render [--check]`.

First come all figures that were held against something, then those that only a GPU can give and
that have no result yet, by the parts of `scripts/gpu-check` that take them, then each result. The
page is never edited by hand; with `--check` the script fails when it is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scripts.gpu_check import PARTS, Part

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"

HEAD = """# Benchmarks

Rendered from `bench/results/` by `python -m bench.render`. Every figure is a ratio to a limit or a
peer that was measured in the same run, since the machines are shared and their speed drifts.
"""


def where(result: dict[str, Any]) -> str:
    """The machine that a result was taken on, in a few words."""
    machine = result["machine"]
    words = f"{machine['processor']}, {machine['cores']} cores"
    return f"{words}, {machine['gpu']}" if machine.get("gpu") else words


def summary(results: list[dict[str, Any]]) -> str:
    """Every figure that was held against something."""
    words = {True: "yes", False: "**no**", None: ""}
    rows = [
        f"| {result['name']} | {figure['what'].strip()} | {figure['reach']} | {figure['measured']} "
        f"| {words[figure['met']]} | {where(result)} |"
        for result in results
        for figure in result["figures"]
        if figure["reach"]
    ]
    lines = [
        "## What was asked and what was measured",
        "",
        "| benchmark | figure | asked | measured | met | machine |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def untaken(parts: tuple[Part, ...]) -> str:
    """The figures that a GPU is needed for and that have no result; empty when all are taken."""
    rows = [
        f"| {ask.figure} | {ask.reach} | `scripts/gpu-check --only {part.name}` |"
        for part in parts
        for ask in part.asks
        if not (RESULTS / part.result).exists()
    ]
    if not rows:
        return ""
    lines = [
        "## Still to be taken on a GPU",
        "",
        "What takes them runs in small sizes over a fake driver (`scripts/gpu-check --fake`). On a",
        "machine with a GPU `scripts/gpu-check` takes all of them, goes on where it was cut short,",
        "and leaves the GPU's settings as they are; packages that such a machine lacks and cannot",
        "fetch are carried there as a folder of wheels: `scripts/gpu-check --wheels DIR`.",
        "",
        "| figure | asked | taken by |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def section(result: dict[str, Any]) -> str:
    """One result as a heading, a line on where it was taken, and a table."""
    versions = sorted(result["versions"].items())
    stack = ", ".join(f"{name} {version}" for name, version in versions)
    sizes = ", ".join(f"{key} {value}" for key, value in result["parameters"].items())
    rows = [
        f"| {figure['what']} | {figure['reach']} | {figure['measured']} |"
        for figure in result["figures"]
    ]
    lines = [
        f"## {result['name']}",
        "",
        f"{result['date']}, {where(result)}; {stack}.",
        f"Sizes: {sizes}.",
        "",
        "| figure | reach | measured |",
        "|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole page."""
    results = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))
    ]
    parts = [HEAD, summary(results), untaken(PARTS), *(section(result) for result in results)]
    return "\n".join(part for part in parts if part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    page = render()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
            print(f"{PAGE} is out of date: run python -m bench.render", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
