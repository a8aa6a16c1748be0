"""The benchmarks of steps run in small sizes, and what they say adds up."""

from __future__ import annotations

import json
from pathlib import Path

from bench import hidden, strict


def test_time_between_steps_is_part_of_the_whole(tmp_path: Path) -> None:
    assert hidden.main(["--fake", "--output", str(tmp_path / "hidden.json")]) == 0
    found = json.loads((tmp_path / "hidden.json").read_text())["measurements"]
    assert 0 < found["between_s"] < found["whole_s"]
    assert found["steps"] == hidden.STEPS_TIMED


def test_strict_and_plain_are_both_measured(tmp_path: Path) -> None:
    output = str(tmp_path / "strict.json")
    assert strict.main(["--fake", "--rounds", "2", "--output", output]) == 0
    found = json.loads(Path(output).read_text())["measurements"]
    assert set(found) == {"batch 1", "batch 2"}
    for plain, exact in found.values():
        assert len(plain) == len(exact) == 2
        assert all(first > 0 and token > 0 for first, token in [*plain, *exact])
