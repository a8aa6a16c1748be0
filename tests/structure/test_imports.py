"""The packages import each other only along the drawn arrows, and torch stays where it belongs.

The arrows are those of docs/architecture.md. The walk reads every import statement, at any depth of
a function too, so that a lazy import is no way around them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each package may import of ours, besides itself; the longest prefix of a name counts.
ARROWS: dict[str, tuple[str, ...]] = {
    "hotbay": (),
    "partitioner": (),
    "swap": (),
    "engine": ("engine.link", "swap"),
    "engine.link": (),
    "daemon.gateway": ("engine.link", "hotbay"),
    "daemon.control": ("partitioner", "swap", "engine.link", "hotbay"),
    "daemon.gpuctl": ("hotbay",),
    "daemon": (),
}
OURS = {"hotbay", "partitioner", "swap", "engine", "daemon"}
WITHOUT_TORCH = (
    "daemon.control.main",
    "daemon.gateway.main",
    "daemon.gpuctl.main",
    "engine.builder",
)


def modules() -> dict[str, Path]:
    """Every module of ours by its import name."""
    found = {}
    for root in (ROOT, ROOT / "proto"):
        for package in OURS:
            for path in sorted((root / package).rglob("*.py")):
                parts = path.relative_to(root).with_suffix("").parts
                found[".".join(part for part in parts if part != "__init__")] = path
    return found


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def package_of(module: str) -> str:
    return max((name for name in ARROWS if is_within(module, name)), key=len)


def imported(path: Path, module: str) -> set[str]:
    """Modules named by a file's import statements; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import at line {node.lineno}"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_import_follows_an_arrow() -> None:
    wrong = []
    for module, path in modules().items():
        source = package_of(module)
        for name in imported(path, module):
            if name.split(".")[0] not in OURS:
                continue
            target = package_of(name)
            if target != source and not any(is_within(name, a) for a in ARROWS[source]):
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_walk_finds_every_package() -> None:
    assert {name.split(".")[0] for name in modules()} == OURS


def test_swap_and_link_never_name_torch() -> None:
    wrong = [
        module
        for module, path in modules().items()
        if package_of(module) not in ("engine",)
        and any(is_within(name, "torch") for name in imported(path, module))
    ]
    assert not wrong


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_process_that_must_not_load_torch_does_not(module: str) -> None:
    code = f"import {module}, sys; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
