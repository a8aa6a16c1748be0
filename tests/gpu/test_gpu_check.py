"""What scripts/gpu-check does with parts that pass, fail, hang and leave processes behind."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import render
from scripts import gpu_check
from scripts.gpu_check import PARTS, Ask, Part

ROOT = Path(__file__).resolve().parents[2]


def python(name: str, code: str, timeout_s: int = 60) -> Part:
    return Part(name, "what it does", ("-c", code), timeout_s)


def check(
    parts: tuple[Part, ...], output: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: a check becomes the parent of what its parts leave."""
    code = f"import sys; from scripts.gpu_check import *; sys.exit(main(sys.argv[1:], {parts!r}))"
    command = [sys.executable, "-c", code, "--output", str(output), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def record(output: Path, part: str) -> dict[str, object]:
    return dict(json.loads((output / f"{part}.record.json").read_text(encoding="utf-8")))


def test_a_part_that_fails_stops_no_other_and_what_passed_is_not_run_again(tmp_path: Path) -> None:
    note, output = tmp_path / "runs", tmp_path / "out"
    passes = python("passes", f"open({str(note)!r}, 'a').write('x')")
    fails = python("fails", "print(123); raise SystemExit(3)")
    first = check((fails, passes), output)
    assert first.returncode == 1
    assert "failed (3)" in first.stdout
    assert record(output, "passes")["outcome"] == "passed"
    assert (output / "fails.log").read_text() == "123\n"
    again = check((fails, passes), output)
    assert "passed before" in again.stdout
    assert note.read_text() == "x"
    # What was changed since has not passed.
    changed = python("passes", f"open({str(note)!r}, 'a').write('y')")
    assert check((changed,), output).returncode == 0
    assert note.read_text() == "xy"


def test_a_part_that_hangs_is_cut_off_and_what_it_left_is_ended(tmp_path: Path) -> None:
    # It leaves a process in a session of its own, as a worker is.
    code = (
        "import subprocess, sys, time\n"
        "sleeping = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print(subprocess.Popen(sleeping, start_new_session=True).pid, flush=True)\n"
        "time.sleep(600)"
    )
    done = check((python("hangs", code, timeout_s=5),), tmp_path)
    assert done.returncode == 1, done.stderr
    assert record(tmp_path, "hangs")["outcome"] == "cut off after 5 s"
    assert record(tmp_path, "hangs")["left_running"] == 1
    pid = int((tmp_path / "hangs.log").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_carried_wheels_are_found_by_the_parts_alone(tmp_path: Path) -> None:
    wheels, output = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    name = "carriedalong"
    files = {
        f"{name}.py": "ANSWER = 42\n",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{name}-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    code = f"import {name}; print({name}.ANSWER)"
    done = check((python("uses", code),), output, "--wheels", str(wheels))
    assert done.returncode == 0, done.stderr
    assert (output / "uses.log").read_text() == "42\n"
    # A check that goes on finds them without being told again; another one does not.
    assert check((python("again", code),), output).returncode == 0
    assert check((python("again", code),), tmp_path / "elsewhere").returncode == 1


def test_what_is_missing_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", ("json", "nobody_has_this", "nor.this"))
    with pytest.raises(SystemExit, match=r"has no nobody_has_this, nor\.this.*--wheels DIR"):
        gpu_check.prepare(None, tmp_path)
    (tmp_path / "wheels").mkdir()
    with pytest.raises(SystemExit, match="no wheel"):
        gpu_check.prepare(tmp_path / "wheels", tmp_path)


def test_all_that_parts_import_is_looked_for_beforehand() -> None:
    helpers = ("results", "worker", "shapes", "peers", "engine_stage", "roofline", "lengths")
    files = {ROOT / "bench" / f"{name}.py" for name in helpers}
    files |= {ROOT / (part.command[1].replace(".", "/") + ".py") for part in PARTS if part.result}
    for folder in ("swap", "engine", "partitioner", "tests/gpu", "tests/swap", "tests/partitioner"):
        files |= set((ROOT / folder).rglob("*.py"))
    imported = {
        name.split(".")[0]
        for path in files
        if "pull" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in _names(node)
    }
    ours = {"bench", "daemon", "engine", "hotbay", "partitioner", "scripts", "swap", "tests"}
    foreign = imported - ours - set(sys.stdlib_module_names)
    assert foreign <= {name.split(".")[0] for name in gpu_check.NEEDED}


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_parts_are_bounded_and_their_results_apart() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(0 < part.timeout_s <= gpu_check.PART_TIMEOUT_S_MAX for part in PARTS)
    results = [part.result for part in PARTS if part.result]
    assert len(set(results)) == len(results)
    assert all(part.result for part in PARTS if part.asks)
    for part in PARTS:
        if part.command[1] != "pytest":
            assert (ROOT / (part.command[1].replace(".", "/") + ".py")).exists()


def test_a_benchmark_is_told_where_its_result_goes() -> None:
    part = Part("one", "w", ("-m", "bench.one"), result="gpu-one.json")
    real = gpu_check.command_of(part, Path("out"), fake=False)
    assert real == ["-m", "bench.one", "--output", "bench/results/gpu-one.json"]
    dry = gpu_check.command_of(part, Path("out"), fake=True)
    assert dry == ["-m", "bench.one", "--output", "out/gpu-one.json", "--fake"]


def test_figures_without_a_result_are_listed_as_still_to_be_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    asks = (Ask("how long it takes", "at most 10 ms"), Ask("what it holds", "nothing"))
    parts = (
        Part("one", "w", ("-m", "bench.one"), result="gpu-one.json", asks=asks),
        Part("two", "w", ("-m", "bench.two"), result="gpu-two.json"),
    )
    page = render.untaken(parts)
    assert "| how long it takes | at most 10 ms | `scripts/gpu-check --only one` |" in page
    assert "what it holds" in page
    assert "two" not in page
    (tmp_path / "gpu-one.json").write_text("{}")
    assert render.untaken(parts) == ""


def test_what_was_asked_is_shown_with_whether_it_was_met() -> None:
    figures = [
        {"what": "  first", "measured": "12 ms", "reach": "<= 10 ms", "met": False},
        {"what": "second", "measured": "8 ms", "reach": "", "met": None},
    ]
    machine = {"processor": "P", "cores": 2, "gpu": "G, driver 1"}
    page = render.summary([{"name": "swap", "machine": machine, "figures": figures}])
    assert "| swap | first | <= 10 ms | 12 ms | **no** | P, 2 cores, G, driver 1 |" in page
    assert "second" not in page
