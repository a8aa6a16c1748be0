"""Runs every test of `interpreted` in one child process, where triton interprets its kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")
CHILD_TIMEOUT_S = 900

pytest.importorskip("triton", reason="triton interprets the kernels")


@pytest.mark.slow
@pytest.mark.timeout(CHILD_TIMEOUT_S)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they run as they are")
def test_every_kernel_in_the_interpreter():
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=5", FOLDER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed, child.stdout
    assert int(passed[1]) >= len(list(FOLDER.glob("test_*.py")))
    assert "skipped" not in child.stdout
