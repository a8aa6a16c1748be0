"""How many threads the library takes, and that their number changes nothing."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from engine.kernels.native.products import Products
from tests.engine.native.decodes import attend, last_tokens
from tests.engine.paged_stage import Stage


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(loaded: ctypes.CDLL, threads: int) -> None:
    before = torch.get_num_threads()
    lengths = [500, 70, 9]
    stage = Stage.make(lengths)
    queries = stage.queries([1] * 3)
    rows, weight = torch.randn(40, 512), torch.randn(1000, 512)
    linear = Products(loaded, torch.float32, strict=True).linear
    results = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            attended = attend(loaded, stage, last_tokens(stage, lengths), queries)
            results.append((attended, linear(rows, weight)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


THREADS_OF_ANOTHER = """
import os, threading, torch
from engine.kernels.native.kernels import NativeKernels
from engine.kernels.protocol import Span
from tests.engine.sequences import Sequences, make_spec

def step():
    threads.append(len(os.listdir("/proc/self/task")))
    plan = stage.kernels.plan(spans, positions)
    stage.kernels.attend(0, queries, plan)
    threads.append(len(os.listdir("/proc/self/task")))

threads = []
torch.set_num_threads(1)
stage = Sequences(make_spec(8, 2, 64), [200] * 8, 0.0, make=NativeKernels, page_bytes=1 << 18)
spans = [Span(199, 1, table) for table in stage.tables]
positions, queries = torch.full((8,), 199), torch.ones(8, 8, 64)
stepping = threading.Thread(target=step)
stepping.start()
stepping.join()
print(*threads)
"""


def test_it_takes_no_more_threads_than_torch_was_told(loaded: ctypes.CDLL) -> None:
    """In a thread other than the one that told it, too."""
    variables = {name: own for name, own in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", THREADS_OF_ANOTHER],
        env=variables | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after == before
