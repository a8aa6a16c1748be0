"""Renders docs/benchmarks.md from bench/results/*.json: `python -m bench.render [--check]`.

The page is never edited by hand; with `--check` the script fails when it is not what the results
say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"

HEAD = """# Benchmarks

Rendered from `bench/results/` by `python -m bench.render`. Every figure is a ratio to a limit or a
peer that was measured in the same run, since the machines are shared and their speed drifts.
"""


def section(result: dict[str, Any]) -> str:
    """One result as a heading, a line on where it was taken, and a table."""
    machine, versions = result["machine"], result["versions"]
    where = f"{machine['processor']}, {machine['cores']} cores"
    if machine.get("gpu"):
        where += f", {machine['gpu']}"
    stack = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    sizes = ", ".join(f"{key} {value}" for key, value in result["parameters"].items())
    rows = [
        f"| {figure['what']} | {figure['reach']} | {figure['measured']} |"
        for figure in result["figures"]
    ]
    lines = [
        f"## {result['name']}",
        "",
        f"{result['date']}, {where}; {stack}.",
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
    return "\n".join([HEAD, *(section(result) for result in results)])


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
