"""Being alone with NVML: the others let go, or whoever asked gives up."""

from __future__ import annotations

import threading

import pytest

from partitioner.errors import ResetNeededError
from partitioner.nvml_gate import NvmlGate


def listen(gate: NvmlGate, inside: threading.Event, ended: threading.Event) -> int:
    """What a thread with NVML open does: use it until somebody wants to be alone, and again."""
    rounds = 0
    while not ended.is_set():
        with gate.using():
            rounds += 1
            inside.set()
            while not gate.wanted and not ended.wait(0.001):
                pass
            inside.clear()
    return rounds


def test_others_let_go_and_come_back() -> None:
    gate, inside, ended = NvmlGate(), threading.Event(), threading.Event()
    thread = threading.Thread(target=listen, args=(gate, inside, ended))
    thread.start()
    try:
        assert inside.wait(10)
        with gate.alone():
            assert not inside.is_set()
            assert gate.wanted
        assert inside.wait(10), "it goes on"
    finally:
        ended.set()
        thread.join(10)
    assert not thread.is_alive()


def test_who_does_not_let_go_is_not_waited_for_long() -> None:
    gate = NvmlGate(wait_s=0.0)
    with gate.using():
        with pytest.raises(ResetNeededError, match="does not let go of NVML"), gate.alone():
            pytest.fail("it is not alone")
        assert not gate.wanted, "others are not held up for it"
    with gate.alone():
        pass


def test_nobody_begins_while_somebody_is_alone() -> None:
    gate, began = NvmlGate(), threading.Event()

    def use() -> None:
        with gate.using():
            began.set()

    thread = threading.Thread(target=use)
    with gate.alone():
        thread.start()
        assert not began.wait(0.05)
    assert began.wait(10)
    thread.join(10)
