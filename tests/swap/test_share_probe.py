"""The tiny client of a share, over the fake driver and as the process that it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from swap.cuda_driver import DriverError
from swap.fake_driver import FakeDriver
from swap.share_probe import see

GIB = 1 << 30


def seen(driver: FakeDriver, limit_bytes: int) -> dict[str, int]:
    told: list[dict[str, int]] = []

    def hold(line: str) -> None:
        assert driver.holdings()["contexts"] == 1, "it is a client while it is looked at"
        told.append(json.loads(line))

    see(driver, limit_bytes, hold)
    assert not any(driver.holdings().values()), "nothing is left"
    return told[0]


@pytest.mark.parametrize(
    ("memory_bytes", "limit_bytes", "gets_bytes"),
    [(GIB, GIB, GIB), (GIB + (32 << 20), GIB, GIB), (8 * GIB, GIB, GIB + (64 << 20))],
    ids=["limited", "limited within the margin", "not limited"],
)
def test_it_tells_what_it_gets(memory_bytes: int, limit_bytes: int, gets_bytes: int) -> None:
    driver = FakeDriver(memory_bytes, multiprocessors=66)
    try:
        sight = {"multiprocessors": 66, "memory_bytes": gets_bytes}
        assert seen(driver, limit_bytes) == sight
    finally:
        driver.close()


@pytest.mark.parametrize("call", ["cuMemCreate"])
def test_another_refusal_is_no_limit(call: str) -> None:
    driver = FakeDriver(GIB)
    driver.refuse.codes[call] = "CUDA_ERROR_MPS_SERVER_NOT_READY"
    try:
        with pytest.raises(DriverError, match="SERVER_NOT_READY"):
            see(driver, GIB, print)
        assert not any(driver.holdings().values())
    finally:
        driver.close()


def test_without_a_gpu_it_says_what_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "swap.share_probe", "--limit-bytes", str(GIB)],
        input="", capture_output=True, text=True, timeout=60, env={"CUDA_VISIBLE_DEVICES": "none"},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.strip()
    assert "Traceback" not in done.stderr
