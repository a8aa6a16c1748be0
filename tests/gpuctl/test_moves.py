"""swap, load, unload, drain and resume: what is asked, what is said, and how it is undone."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from google.longrunning.operations_proto_pb2 import Operation
from hotbay.reasons import Reason
from hotbay.v1 import common_pb2, model_pb2, node_pb2

from daemon.gpuctl.follow import ledger_lines, plan_lines
from daemon.gpuctl.moves import swap_sentence
from tests.gpuctl.conftest import Run
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import GIB, Refusal


def test_a_swap_ends_with_its_sentence_and_a_way_back(gpuctl: Run) -> None:
    done = gpuctl("swap", "prose", "code")
    assert done.code == 0
    assert done.err == ""
    assert done.out.splitlines() == [
        "operation: operations/0001",
        "undo:      gpuctl swap code prose --partition gpu0",
        "swapped prose -> code on gpu0 in 0.41 s: 0 requests lost, 12 finished, 3 kept",
    ]


def test_the_way_back_can_be_pasted(node: ScriptedNode, gpuctl: Run) -> None:
    undo = gpuctl("swap", "prose", "code").out.splitlines()[1].removeprefix("undo:").split()
    assert gpuctl(*undo[1:]).code == 0
    request = node.last(model_pb2.SwapModelRequest)
    assert (request.outgoing, request.incoming, request.partition) == ("code", "prose", "gpu0")


def test_options_of_a_swap_reach_the_daemon(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl(
        "swap", "prose", "code", "--partition", "gpu0", "--in-flight", "recompute",
        "--drain-timeout", "1.5", "--request-id", "mine",
    )  # fmt: skip
    assert done.code == 0
    request = node.last(model_pb2.SwapModelRequest)
    assert request.in_flight == common_pb2.IN_FLIGHT_POLICY_RECOMPUTE
    assert request.drain_timeout.ToNanoseconds() == 1_500_000_000
    assert (request.partition, request.request_id) == ("gpu0", "mine")


@pytest.mark.parametrize("word", ["drain", "preserve", "recompute", "abort"])
def test_every_in_flight_policy_has_its_word(node: ScriptedNode, gpuctl: Run, word: str) -> None:
    assert gpuctl("swap", "prose", "code", "--in-flight", word).code == 0
    policy = node.last(model_pb2.SwapModelRequest).in_flight
    assert common_pb2.InFlightPolicy.Name(policy) == f"IN_FLIGHT_POLICY_{word.upper()}"


def test_the_sentence_and_the_ledger_tell_what_was_preserved() -> None:
    ledger = common_pb2.Ledger(
        requests_kept=3, requests_preserved=2, parked_bytes=GIB, park_ms=20, unpark_ms=5
    )
    done = Operation()
    done.response.Pack(model_pb2.SwapModelResponse(partition="gpu0", ledger=ledger))
    assert swap_sentence(done, "a", "b").endswith("3 kept, 2 with their KV")
    lines = ledger_lines(ledger)
    assert "requests:  0 lost, 0 finished, 3 kept, 2 with their KV" in lines
    assert any(line.startswith("parked:") for line in lines)
    assert any(line.startswith("unparked:") for line in lines)


def test_a_swap_or_load_may_be_queued(node: ScriptedNode, gpuctl: Run) -> None:
    assert gpuctl("swap", "prose", "code", "--queue").code == 0
    assert node.last(model_pb2.SwapModelRequest).queue
    assert gpuctl("load", "code", "--queue").code == 0
    assert node.last(model_pb2.LoadModelRequest).queue
    assert gpuctl("load", "code").code == 0
    assert not node.last(model_pb2.LoadModelRequest).queue


def test_staging_and_how_it_is_undone(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl("stage", "code", "--partition", "gpu0")
    assert done.code == 0, done.err
    assert "undo:      gpuctl unload code" in done.out.splitlines()
    assert done.out.splitlines()[-1].startswith("staged code on gpu0")
    request = node.last(model_pb2.StageModelRequest)
    assert (request.model, request.partition) == ("code", "gpu0")
    assert (request.layers, request.weights_bytes) == (0, 0)
    assert gpuctl("stage", "code", "--layers", "3").code == 0
    assert node.last(model_pb2.StageModelRequest).layers == 3
    assert gpuctl("stage", "code", "--bytes", "4096").code == 0
    assert node.last(model_pb2.StageModelRequest).weights_bytes == 4096


def test_calibrating_says_each_rate(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl("calibrate")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == (
        "measured gpu0 50.00 GB/s to the device, 40.00 GB/s from it"
    )
    assert node.last(node_pb2.CalibrateRequest).partition == ""


def test_a_plan_says_what_it_parks() -> None:
    assert not any("parks:" in line for line in plan_lines(common_pb2.SwapPlan()))
    lines = plan_lines(common_pb2.SwapPlan(parked_bytes=GIB))
    assert "parks:     up to 1.00 GiB of KV in host memory, beside the copy" in lines


def test_a_dry_run_shows_the_plan_and_changes_nothing(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl("swap", "prose", "code", "--dry-run")
    assert done.code == 0
    assert done.out.splitlines() == [
        "plan:      prose@1 -> code@1 on gpu0",
        "copy:      1.00 GiB to the device, 1.00 GiB given up there",
        "device:    1.00 GiB needed, 2.00 GiB available",
        "predicted: 21.0 ms",
        "nothing was changed",
    ]
    assert node.last(model_pb2.SwapModelRequest).validate_only
    assert node.operations == {}


def test_a_dry_run_that_finds_it_cannot_be_says_so(node: ScriptedNode, gpuctl: Run) -> None:
    refusal = Refusal(Reason.INSUFFICIENT_DEVICE_MEMORY, "1 GiB is missing")
    node.plan_error = refusal
    done = gpuctl("swap", "prose", "code", "--dry-run")
    assert (done.code, done.out) == (7, "")
    assert "1 GiB is missing" in done.err


def test_without_waiting_the_name_alone_is_the_answer(node: ScriptedNode, gpuctl: Run) -> None:
    node.held = True
    done = gpuctl("swap", "prose", "code", "--no-wait")
    assert (done.code, done.out) == (0, "operations/0001\n")
    assert "gpuctl op wait 0001" in done.err
    assert "gpuctl swap code prose" in done.err
    assert not node.operations["operations/0001"].done


CHANGES: list[tuple[list[str], int, str, str]] = [
    (["load", "code"], common_pb2.MODEL_STATE_ACTIVE, "gpuctl unload code",
     "loaded code on gpu0, now ACTIVE"),
    (["load", "code"], common_pb2.MODEL_STATE_STANDBY, "gpuctl unload code --evict",
     "loaded code on gpu0, now STANDBY"),
    (["unload", "prose"], common_pb2.MODEL_STATE_STANDBY, "gpuctl load prose --partition gpu0",
     "unloaded prose on gpu0, now STANDBY"),
    (["drain", "prose"], common_pb2.MODEL_STATE_STAGED, "gpuctl resume prose",
     "drained prose on gpu0, now STAGED"),
    (["resume", "prose"], common_pb2.MODEL_STATE_ACTIVE, "gpuctl drain prose",
     "resumed prose on gpu0, now ACTIVE"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "state", "undo", "sentence"), CHANGES)
def test_every_change_names_its_operation_and_its_undo(
    node: ScriptedNode, gpuctl: Run, words: list[str], state: Any, undo: str, sentence: str
) -> None:
    node.response_state = state
    done = gpuctl(*words)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "operation: operations/0001", f"undo:      {undo}", sentence,
    ]  # fmt: skip
    assert gpuctl(*shlex.split(undo)[1:]).code == 0


@pytest.mark.parametrize("words", [one[0] for one in CHANGES[1:]])
def test_every_change_can_be_tried_and_left_alone(
    node: ScriptedNode, gpuctl: Run, words: list[str]
) -> None:
    assert gpuctl(*words, "--dry-run").out.endswith("nothing was changed\n")
    assert node.operations == {}
    node.held = True
    assert gpuctl(*words, "--no-wait").out == "operations/0001\n"


def test_flags_of_load_and_unload(node: ScriptedNode, gpuctl: Run) -> None:
    assert gpuctl("load", "code", "--standby", "-p", "gpu0").code == 0
    load = node.last(model_pb2.LoadModelRequest)
    assert (load.standby, load.partition) == (True, "gpu0")
    assert gpuctl("unload", "code", "--evict", "--in-flight", "abort").code == 0
    unload = node.last(model_pb2.UnloadModelRequest)
    assert unload.evict
    assert unload.in_flight == common_pb2.IN_FLIGHT_POLICY_ABORT


def test_json_of_a_change_is_the_operation(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl("swap", "prose", "code", "-o", "json")
    operation = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert operation["name"] == "operations/0001"
    assert operation["done"] is True
    assert operation["metadata"]["@type"].endswith("/hotbay.v1.OperationMetadata")
    assert operation["metadata"]["stage"] == "OPERATION_STAGE_COMMITTED"
    assert operation["response"]["ledger"]["copiedBytes"] == str(GIB)
    assert operation["response"]["ledger"]["requestsLost"] == "0"  # zero is said, not left out


def test_json_of_a_failed_change_is_the_operation_too(node: ScriptedNode, gpuctl: Run) -> None:
    node.outcome = Refusal(Reason.CORRUPT_WEIGHTS, "checksum of layer 3", {"tensor": "layers.3"})
    done = gpuctl("load", "code", "-o", "json")
    assert done.code == 1
    error = json.loads(done.out)["error"]
    assert error["message"] == "checksum of layer 3"
    assert error["details"][0]["reason"] == "CORRUPT_WEIGHTS"
    assert "CORRUPT_WEIGHTS (tensor=layers.3)" in done.err
