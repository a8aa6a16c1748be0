"""What the documents say is what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmarks_page_is_rendered_from_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.render", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_every_file_that_a_document_links_to_exists() -> None:
    links = [
        (document, target)
        for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    ]
    assert links
    assert [link for link in links if not (link[0].parent / link[1]).exists()] == []


def test_every_path_of_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:daemon|engine|swap|partitioner|proto|tests)/[\w./*]+)`", text)
    assert len(named) > 10
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_decisions_are_numbered_in_one_row_as_their_titles_say() -> None:
    decisions = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [one.name[:5] for one in decisions] == [
        f"{number:04}-" for number in range(1, len(decisions) + 1)
    ]
    for number, one in enumerate(decisions, 1):
        assert one.read_text(encoding="utf-8").startswith(f"# {number}. "), one.name
