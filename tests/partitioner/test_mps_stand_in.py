"""The rules of the simulated MPS daemon, and a server brought back after a fault."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from partitioner.errors import MpsAnswerError, MpsError
from partitioner.mps import control as vocabulary
from partitioner.mps.commands import Commands
from partitioner.mps.control import Language, Limits, ServerStatus
from partitioner.mps.probing import control as control_of
from partitioner.mps.recovery import faulted, recover
from partitioner.simulated.mps_state import (
    DEFAULT,
    FULL,
    NO_SERVER,
    NOT_READY,
    MpsState,
    SharedLimits,
)
from partitioner.simulated.mps_texts import FAULT_COMMAND, legacy, named
from tests.partitioner.test_mps_contract import CLIENT, DEVICE, STAND_IN, Bench, end

pytestmark = pytest.mark.timeout(300)
GIB = 1 << 30


def served(clients_max: int = 48) -> MpsState:
    state = MpsState(DEVICE, clients_max, 700)
    state.start_server("s", 0, DEVICE)
    return state


def test_defaults_bind_the_next_server_and_limits_of_a_server_the_next_client() -> None:
    state = served()
    assert legacy(state, "set_default_active_thread_percentage 25") == ("25.0\n", 0)
    assert legacy(state, f"set_default_device_pinned_mem_limit {DEVICE} 3072M") == ("", 0)
    assert legacy(state, f"get_default_device_pinned_mem_limit {DEVICE}") == ("3G\n", 0)
    assert legacy(state, "get_active_thread_percentage 700") == ("100.0\n", 0)
    assert state.connect(1, "s", DEFAULT, {}, None) == SharedLimits(None, 100.0)
    legacy(state, "set_active_thread_percentage 700 40")
    legacy(state, f"set_device_pinned_mem_limit 700 {DEVICE} 2G")
    assert state.connect(2, "s", DEFAULT, {DEVICE: GIB}, 60.0) == SharedLimits(GIB, 40.0)


def test_a_typo_is_taken_in_silence_and_one_in_the_environment_takes_the_limit_away() -> None:
    state = served()
    assert legacy(state, "set_device_pinned_mem_limit 700 GPU-typo 2G") == ("", 0)
    told, _ = legacy(state, f"get_device_pinned_mem_limit 700 {DEVICE}")
    with pytest.raises(MpsAnswerError):
        vocabulary.parse_size(told)
    legacy(state, f"set_device_pinned_mem_limit 700 {DEVICE} 2G")
    assert state.connect(1, "s", DEFAULT, {"GPU-typo": GIB}, None) == SharedLimits(None, 100.0)


def test_a_fault_refuses_clients_until_all_are_gone() -> None:
    state = served(clients_max=2)
    assert state.connect(1, "unheard", DEFAULT, {}, None) == NO_SERVER
    state.connect(1, "s", DEFAULT, {}, None)
    state.connect(2, "s", DEFAULT, {}, None)
    assert state.connect(3, "s", DEFAULT, {}, None) == FULL
    legacy(state, FAULT_COMMAND)
    assert legacy(state, "get_server_status 700") == ("FAULT\n", 0)
    state.gone(1)
    assert state.connect(3, "s", DEFAULT, {}, None) == NOT_READY
    assert legacy(state, "terminate_client 700 2") == ("0\n", 0)
    assert legacy(state, "get_server_status 700") == ("ACTIVE\n", 0)
    assert isinstance(state.connect(3, "s", DEFAULT, {}, None), SharedLimits)


@pytest.mark.parametrize(
    "words",
    [
        "server create Upper", "server get nobody status", "namespace set mps9 --server=hotbay",
        "namespace delete mps0 --server=hotbay", "client terminate 5", "sm-partition list",
    ],
)  # fmt: skip
def test_named_commands_that_are_refused(words: str) -> None:
    state = MpsState(DEVICE, 48, 700)
    named(state, ["server", "create", "hotbay"], 0)
    named(state, ["namespace", "create", "mps0", "--server=hotbay"], 0)
    state.connect(1, "hotbay", "mps0", {}, None)
    text, code = named(state, words.split(), 0)
    assert (text.startswith("Error: "), code) == (True, 1)


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("3G", 3 * GIB), ("1408M\n", 1408 << 20), ("1.5G", GIB * 3 // 2)]
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert vocabulary.parse_size(text) == size_bytes


@pytest.mark.parametrize("language", list(Language))
def test_a_server_is_active_again_after_a_fault(tmp_path: Path, language: Language) -> None:
    limits = (Limits(GIB, 50), Limits(GIB, 50))

    async def scenario() -> None:
        control = control_of(language, STAND_IN, tmp_path, DEVICE)
        bench = Bench(control, CLIENT, 132, 141 * GIB, tmp_path)
        ended: list[int] = []
        try:
            await control.share(limits)
            clients = [(await bench.begin(number, limits[number]))[0] for number in range(2)]
            commands = Commands(STAND_IN, tmp_path, {})
            if language is Language.LEGACY:
                await commands.ask(text=FAULT_COMMAND)
            else:
                await commands.ask(FAULT_COMMAND)
            assert await faulted(control)
            with pytest.raises(AssertionError, match=NOT_READY):
                await bench.begin(0, limits[0])

            async def end_clients() -> None:
                assert await control.clients() == (), "contexts are taken before processes end"
                for each in clients:
                    await end(each)
                    ended.append(each.pid)

            await recover(control, limits, end_clients)
            assert ended == [each.pid for each in clients]
            (server,) = await control.servers()
            assert server.status is ServerStatus.ACTIVE
            again, sees = await bench.begin(1, limits[1])
            assert sees == {"multiprocessors": 66, "memory_bytes": GIB}
            await end(again)
        finally:
            await control.stop()

    asyncio.run(scenario())


def test_a_program_that_runs_as_a_client_is_one_until_it_ends(tmp_path: Path) -> None:
    async def scenario() -> None:
        control = control_of(Language.LEGACY, STAND_IN, tmp_path, DEVICE)
        limits = Limits(GIB, 50)
        try:
            await control.share((limits,))
            variables = control.environment(0, limits)
            process = await asyncio.create_subprocess_exec(
                *("env", *(f"{name}={value}" for name, value in variables.items())),
                *(*CLIENT, "--", sys.executable, "-c", "print(1, flush=True); input()"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"1\n"
            assert await control.clients() == (process.pid,)
            process.kill()
            await process.wait()
            while await control.clients():  # noqa: ASYNC110 (its daemon hears of it by and by)
                await asyncio.sleep(0.01)
        finally:
            await control.stop()
        with pytest.raises(MpsError):
            await control.servers()

    asyncio.run(scenario())


def test_it_can_be_run_by_hand(tmp_path: Path) -> None:
    """Started in version 3 by the flag alone, as a person would."""
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}

    def ask(*words: str, text: str = "") -> tuple[int, str]:
        done = subprocess.run(
            [*STAND_IN, *words], env=environment, input=text, capture_output=True, text=True
        )
        return done.returncode, done.stdout

    assert ask(text="get_server_list") == (1, "Cannot find MPS control daemon process\n")
    assert ask("-d", "-p", "3") == (0, "")
    try:
        assert ask("-d")[0] == 1
        assert ask("server", "create", "one") == (0, "")
        code, listed = ask("server", "list", "--format=csv,noheader")
        assert (code, listed.split(",")[0]) == (0, "one")
    finally:
        assert ask("-q") == (0, "")
