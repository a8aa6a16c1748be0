"""Turns at a shared link: in order, swaps before pieces, and never a reason to fail a copy."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from swap.shared_link import Link, OwnLink, SharedLink

WAIT_S = 120.0
NEVER = threading.Event()

HOLDER = """
import sys, threading
from pathlib import Path
from swap.shared_link import SharedLink
turn = SharedLink(Path(sys.argv[1])).turn(background=sys.argv[2] == "piece")
turn.take(threading.Event())
print("mine", flush=True)
sys.stdin.read()
"""

COPIER = """
import json, sys, threading, time
from pathlib import Path
from swap.shared_link import SharedLink
path, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.stdin.readline()
for kind, hold_s in plan:
    turn = SharedLink(path).turn(background=kind == "piece")
    draw = turn._draw
    def drawn(lane):
        global asked
        done = draw(lane)
        asked = time.monotonic()
        return done
    turn._draw = drawn
    turn.take(threading.Event())
    began = time.monotonic()
    time.sleep(hold_s)
    ended, number = time.monotonic(), turn.number
    turn.end()
    print(json.dumps([kind, number, asked, began, ended, turn.missed]), flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "0000:10:00.0"


def start(program: str, path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def hold(path: Path):
    """Starts processes that have a turn, and ends them."""
    holders = []

    def begin(kind: str) -> subprocess.Popen[str]:
        holder = start(HOLDER, path, kind)
        holders.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        return holder

    yield begin
    for holder in holders:
        holder.kill()
        holder.communicate()


@pytest.fixture(params=["own", "shared"])
def link(request: pytest.FixtureRequest, path: Path) -> Link:
    return OwnLink() if request.param == "own" else SharedLink(path)


def test_a_turn_at_an_idle_link_comes_at_once_and_again(link: Link) -> None:
    for background in (False, True):
        turn = link.turn(background=background)
        assert turn.whole is not background
        for _ in range(3):
            turn.take(NEVER)
            assert not turn.waiting
            assert not turn.missed
            turn.pause()
        turn.end()
        turn.end()


def in_thread(turn) -> tuple[threading.Thread, threading.Event]:
    given_up = threading.Event()
    thread = threading.Thread(target=turn.take, args=(given_up,), daemon=True)
    thread.start()
    return thread, given_up


@pytest.mark.parametrize("kind", ["swap", "piece"])
@pytest.mark.parametrize("background", [False, True])
def test_it_waits_for_another_process_and_for_no_dead_one(path, hold, kind, background) -> None:
    holder = hold(kind)
    turn = SharedLink(path).turn(background=background)
    thread, _ = in_thread(turn)
    thread.join(0.05)
    assert thread.is_alive()
    assert turn.waiting
    holder.kill()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert not turn.waiting
    assert turn.waited_s >= 0.05
    assert not turn.missed
    turn.end()


def test_a_swap_keeps_its_turn_between_pieces_and_a_piece_does_not(path: Path) -> None:
    link = SharedLink(path, swap_wait_s=0.0, background_wait_s=0.0)
    swap, other = link.turn(), link.turn()
    swap.take(NEVER)
    swap.pause()
    other.take(NEVER)
    assert other.missed
    swap.end()
    other.end()
    piece, swap = link.turn(background=True), link.turn()
    piece.take(NEVER)
    piece.pause()
    swap.take(NEVER)
    assert not swap.missed
    piece.take(NEVER)
    assert piece.missed  # it goes on all the same, after its limit
    piece.end()
    swap.end()


def test_a_turn_that_does_not_come_is_missed_and_the_copy_goes_on(path, hold) -> None:
    hold("swap")
    turn = SharedLink(path, swap_wait_s=0.05).turn()
    turn.take(NEVER)
    assert turn.missed
    assert 0.05 <= turn.waited_s < WAIT_S
    later = SharedLink(path, swap_wait_s=0.05).turn()
    later.take(NEVER)
    assert later.missed
    assert later.number == turn.number + 1
    turn.end()
    later.end()


def test_who_gives_up_waits_no_longer_and_leaves_the_queue(path, hold) -> None:
    holder = hold("swap")
    turn, behind = SharedLink(path).turn(), SharedLink(path).turn()
    thread, given_up = in_thread(turn)
    while not turn.number:
        pass
    waiting, _ = in_thread(behind)
    given_up.set()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert not turn.missed
    turn.end()
    holder.kill()
    waiting.join(WAIT_S)
    assert not waiting.is_alive()
    assert not behind.missed
    behind.end()


def test_without_its_file_a_copy_goes_on(tmp_path: Path, caplog) -> None:
    turn = SharedLink(tmp_path / "missing" / "link").turn()
    turn.take(NEVER)
    assert turn.missed
    assert not turn.waiting
    assert "goes on without a turn" in caplog.text
    turn.end()


@pytest.mark.parametrize("seed", range(3))
def test_processes_copy_one_at_a_time_swaps_in_order_and_first(path: Path, seed: int) -> None:
    source = random.Random(seed)
    kinds = ["swap", "piece"]
    plans = [[(source.choice(kinds), source.uniform(0, 0.006)) for _ in range(25)] for _ in "1234"]
    copiers = [start(COPIER, path, json.dumps(plan)) for plan in plans]
    for copier in copiers:
        assert copier.stdin is not None
        copier.stdin.write("go\n")
        copier.stdin.flush()
    turns = [
        json.loads(line)
        for one in copiers
        for line in one.communicate(timeout=60)[0].split("\n")
        if line
    ]
    assert len(turns) == 100
    assert not any(missed for *_, missed in turns)
    by_time = sorted(turns, key=lambda turn: turn[3])
    for (*_, ended, _), (_, _, _, began, _, _) in itertools.pairwise(by_time):
        assert ended <= began, "two copies at once"
    for kind in kinds:
        numbers = [turn[1] for turn in by_time if turn[0] == kind]
        assert numbers == sorted(numbers), f"a {kind} overtook another"
    pieces = [turn for turn in turns if turn[0] == "piece"]
    for kind, number, asked, began, _, _ in turns:
        if kind == "swap":
            # One may have had its turn just before the swap drew its number.
            passed = [one for one in pieces if asked < one[3] < began]
            assert len(passed) <= 1, f"pieces went before swap {number}: {passed}"
