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
# hotbayd's folders: each may import those named here, and the modules of CONTROL_BASE.
CONTROL_ARROWS: dict[str, tuple[str, ...]] = {
    "processes": (),
    "state": ("processes",),
    "actions": ("state", "processes"),
    "doctor": (),
    "services": ("actions", "state", "processes", "doctor"),
}
CONTROL_BASE = (
    "config",
    "config_file",
    "config_text",
    "errors",
    "failpoints",
    "lock",
    "notify",
    "processor",
)
CONTROL_TOP = (["main"], ["lifetime"], ["node"], ["parts"])
OURS = {"hotbay", "partitioner", "swap", "engine", "daemon"}
WITHOUT_TORCH = (
    "daemon.control.main",
    "daemon.gateway.main",
    "daemon.gpuctl.main",
    "engine.builder",
    "engine.pull.process",
)
# Programs that never speak to a hub themselves.
WITHOUT_HUB = (
    "daemon.control.main",
    "daemon.gateway.main",
    "daemon.gpuctl.main",
    "engine.builder",
    "engine.worker.main",
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


def test_the_folders_of_the_daemon_import_one_way() -> None:
    wrong = []
    for module, path in modules().items():
        parts = module.split(".")
        if parts[:2] != ["daemon", "control"] or parts[2:3] in ([], *CONTROL_TOP):
            continue
        allowed = (*CONTROL_BASE, *CONTROL_ARROWS.get(parts[2], ()), parts[2])
        for name in imported(path, module):
            target = name.split(".")
            if target[:2] == ["daemon", "control"] and target[2:3] and target[2] not in allowed:
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


@pytest.mark.parametrize("module", WITHOUT_HUB)
def test_only_the_puller_loads_the_hub_client(module: str) -> None:
    code = f"import {module}, sys; print('huggingface_hub' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_only_the_puller_names_the_hub_client() -> None:
    clients = ("huggingface_hub", "httpx2")
    named = {
        module
        for module, path in modules().items()
        if any(is_within(name, client) for name in imported(path, module) for client in clients)
    }
    assert named == {"engine.pull.hub"}
