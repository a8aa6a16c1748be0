"""Each library that this processor runs, in turn; tests are skipped where there is none."""

from __future__ import annotations

import ctypes

import pytest

from engine.kernels.native.machine_code import levels_here, load


@pytest.fixture(params=levels_here() or ["none"])
def loaded(request: pytest.FixtureRequest) -> ctypes.CDLL:
    found = load(request.param) if request.param in levels_here() else None
    if found is None:
        pytest.skip("no library was compiled for this processor")
    return found
