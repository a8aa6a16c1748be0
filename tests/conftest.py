"""What holds for every test."""

from __future__ import annotations

import os

import pytest

# Before torch is loaded: what is computed here is too small for several threads, which would wait
# for each other most of the time, and the other processes under test want their cores too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

SEQUENCES = 14
"""Random sequences that a property is tried with, unless `--sequences` says otherwise."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let somebody with time try more."""
    parser.addoption("--sequences", type=int, default=SEQUENCES, help="how many to try")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Number the sequences of a test that has a parameter `sequence`."""
    if "sequence" in metafunc.fixturenames:
        metafunc.parametrize("sequence", range(metafunc.config.getoption("--sequences")))
