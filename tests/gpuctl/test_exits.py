"""Exit codes and the words beside them: every way a command can fail."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hotbay import errors
from hotbay.reasons import Code, Reason
from hotbay.v1 import model_pb2

from daemon.gpuctl.exits import Exit, exit_of
from tests.gpuctl.conftest import PROGRAM, Run, environment, in_process
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import Refusal


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.INVALID_ARGUMENT, 2),
        (Reason.REQUEST_ID_REUSED, 2),
        (Reason.PARTITION_NOT_FOUND, 3),
        (Reason.OPERATION_IN_PROGRESS, 4),
        (Reason.INVALID_STATE, 4),
        (Reason.ARCH_UNSUPPORTED, 4),
        (Reason.ROLE_DENIED, 5),
        (Reason.DAEMON_DRAINING, 6),
        (Reason.INSUFFICIENT_DEVICE_MEMORY, 7),
        (Reason.QUEUE_FULL, 7),
        (Reason.INTERNAL, 1),
        (Reason.NOT_IMPLEMENTED, 1),
        (Reason.CORRUPT_WEIGHTS, 1),
    ],
)
def test_a_refusal_gives_code_message_reason_figures_and_advice(
    node: ScriptedNode, gpuctl: Run, reason: Reason, code: int
) -> None:
    node.refusals["SwapModel"] = Refusal(reason, "no, because", {"b": "2", "a": "1"})
    done = gpuctl("swap", "prose", "code")
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines() == [
        "gpuctl: no, because",
        f"  reason:      {reason} (a=1, b=2)",
        f"  what to do:  {reason.advice}",
    ]


@pytest.mark.parametrize(
    ("reason", "stage", "code", "words"),
    [
        (Reason.EXCHANGE_FAILED, model_pb2.OPERATION_STAGE_ROLLED_BACK, 1, "was rolled back"),
        (Reason.DRAIN_TIMEOUT, model_pb2.OPERATION_STAGE_ROLLED_BACK, 1, "was rolled back"),
        (Reason.CHECKPOINT_INVALID, model_pb2.OPERATION_STAGE_BUILDING, 1, "was rolled back"),
        (Reason.INSUFFICIENT_HOST_MEMORY, model_pb2.OPERATION_STAGE_PLANNING, 7, "was rolled back"),
        (Reason.WORKER_CRASHED, model_pb2.OPERATION_STAGE_ROLLING_BACK, 9, "could NOT be rolled"),
    ],
)
def test_a_failed_operation_says_whether_things_are_as_they_were(
    node: ScriptedNode,
    gpuctl: Run,
    reason: Reason,
    stage: model_pb2.OperationStage.ValueType,
    code: int,
    words: str,
) -> None:
    node.outcome, node.end_stage = Refusal(reason, "it failed"), stage
    done = gpuctl("swap", "prose", "code")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("gpuctl: it failed\n  operation:   operations/0001")
    assert words in done.err
    assert reason.value in done.err


def test_nobody_answers(tmp_path: Path) -> None:
    done = in_process(f"unix:{tmp_path}/none.sock")("ps")
    assert (done.code, done.out) == (6, "")
    assert "none.sock: No such file or directory" in done.err
    assert "--endpoint or HOTBAY_ENDPOINT" in done.err


def test_a_dead_daemons_socket_is_nobody_as_well(node: ScriptedNode, gpuctl: Run) -> None:
    node.socket.rename(node.socket.with_suffix(".live"))
    node.socket.touch()
    done = gpuctl("ps")
    assert done.code == 6
    node.socket.unlink()


def test_time_over_and_the_operation_goes_on(node: ScriptedNode, gpuctl: Run) -> None:
    node.held = True
    done = gpuctl("swap", "prose", "code", "--timeout", "0.2")
    assert (done.code, done.out) == (8, "")
    assert "operations/0001 still runs after 0.2 s" in done.err
    assert not node.operations["operations/0001"].done


@pytest.mark.parametrize(
    "words",
    [
        ["swap", "prose"],
        ["nonsense"],
        ["swap", "prose", "code", "--in-flight", "perhaps"],
        ["ps", "-o", "xml"],
        ["swap", "prose", "code", "--drain-timeout", "-1"],
        ["ps", "--timeout", "soon"],
        ["ps", "--endpoint", "nowhere"],
    ],
)
def test_what_makes_no_sense_is_usage_and_reaches_nobody(
    node: ScriptedNode, gpuctl: Run, words: list[str]
) -> None:
    done = gpuctl(*words)
    assert done.code == 2
    assert done.err
    assert node.requests == []


@pytest.mark.parametrize(
    ("words", "guess"),
    [
        (["load", "proze"], "did you mean 'prose' instead of 'proze'?"),
        (["swap", "prose", "cod"], "did you mean 'code' instead of 'cod'?"),
        (["model", "show", "prosa"], "did you mean 'prose' instead of 'prosa'?"),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest(gpuctl: Run, words: list[str], guess: str) -> None:
    done = gpuctl(*words)
    assert done.code == 3
    assert guess in done.err


def test_nothing_is_guessed_where_nothing_is_like_it(gpuctl: Run) -> None:
    done = gpuctl("load", "xyzzy")
    assert done.code == 3
    assert "did you mean" not in done.err
    assert "gpuctl model ls" in done.err


def test_an_unknown_partition_is_met_with_the_nearest(node: ScriptedNode, gpuctl: Run) -> None:
    node.refusals["LoadModel"] = Refusal(Reason.PARTITION_NOT_FOUND, "no partition 'gpu1'")
    done = gpuctl("load", "code", "--partition", "gpu1")
    assert done.code == 3
    assert "did you mean 'gpu0' instead of 'gpu1'?" in done.err


def test_a_daemon_that_guesses_is_not_guessed_over(node: ScriptedNode, gpuctl: Run) -> None:
    node.refusals["LoadModel"] = Refusal(
        Reason.MODEL_NOT_FOUND, "no 'proze': did you mean prose?", {"suggestions": "prose"}
    )
    done = gpuctl("load", "proze")
    assert done.err.count("did you mean") == 1
    assert "ListModels" not in node.calls


def test_a_guess_that_fails_does_not_hide_the_error(node: ScriptedNode, gpuctl: Run) -> None:
    node.refusals["ListModels"] = Refusal(Reason.INTERNAL, "the list is gone")
    done = gpuctl("load", "proze")
    assert done.code == 3
    assert "no model 'proze'" in done.err
    assert "the list is gone" not in done.err


def test_an_unknown_operation(gpuctl: Run) -> None:
    assert gpuctl("op", "show", "9999").code == 3


def test_control_characters_of_a_server_never_reach_the_terminal(
    node: ScriptedNode, gpuctl: Run
) -> None:
    node.refusals["SwapModel"] = Refusal(
        Reason.INTERNAL, "[bold]red\x1b]0;owned\x07[/bold]", {"k": "\x9b31m"}
    )
    done = gpuctl("swap", "prose", "code")
    assert r"[bold]red\x1b]0;owned\x07[/bold]" in done.err
    assert "\x1b" not in done.err
    assert "\x9b" not in done.err


def test_every_error_of_the_client_has_a_code() -> None:
    assert exit_of(errors.HotbayError("?")) is Exit.FAILED
    assert exit_of(errors.CallTimedOut("late")) is Exit.TIMED_OUT
    kinds = {error: exit_of(error("?", code=Code.UNKNOWN)) for error in errors.REFUSALS.values()}
    assert kinds[errors.Denied] is Exit.DENIED
    assert set(kinds.values()) == {2, 3, 4, 5, 6, 7, 1}


def test_a_closed_pipe_is_no_traceback(node: ScriptedNode) -> None:
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    assert reader.stdin is not None
    done = subprocess.run(
        [*PROGRAM, "model", "ls"],
        env=environment(HOTBAY_ENDPOINT=node.endpoint),
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    reader.stdin.close()
    assert done.returncode == 1
    assert done.stderr == ""
