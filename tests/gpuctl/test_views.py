"""status, ps, model, op and events: what people read, and what programs read."""

from __future__ import annotations

import json
import time

import pytest
from google.longrunning.operations_proto_pb2 import ListOperationsResponse
from google.protobuf.json_format import Parse
from hotbay.reasons import Reason
from hotbay.v1 import common_pb2, model_pb2, node_pb2, partition_pb2, watch_pb2

from tests.gpuctl.conftest import Run
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import GIB, Refusal, ledger, version


def test_status_is_one_screen_with_everything(node: ScriptedNode, gpuctl: Run) -> None:
    node.node.start_time.FromSeconds(int(time.time()) - 3700)
    node.node.warnings.append("the link was never measured; run calibrate")
    node.gpus.unreachable.append("GPU-dead")
    done = gpuctl("status")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) <= 24
    assert lines[0] == "hotbayd 9.9.9 on testhost, simulated, up 1 h 1 m, driver 999.0"
    assert lines[1].startswith("host store 2.00 GiB of 16.0 GiB in 0 images")
    assert any(line.split() == ["0", "H200", "141", "GiB", "0", "B", "off", "ok"] for line in lines)
    assert any("GPU-dead" in line and "LOST" in line for line in lines)
    assert any(line.startswith("gpu0") and line.endswith("prose@1 ACTIVE") for line in lines)
    assert "2 models registered: 1 ACTIVE, 1 STANDBY" in lines
    assert lines[-1] == "warning: the link was never measured; run calibrate"


def test_status_in_json_is_made_of_the_apis_messages(node: ScriptedNode, gpuctl: Run) -> None:
    answer = json.loads(gpuctl("status", "-o", "json").out)
    assert set(answer) == {"node", "gpus", "unreachable", "partitions", "models"}
    assert Parse(json.dumps(answer["node"]), node_pb2.Node()) == node.node
    assert answer["partitions"][0]["memoryBytes"] == str(2 * GIB)


@pytest.mark.parametrize(
    ("health", "warning", "code", "words"),
    [
        (partition_pb2.PARTITION_HEALTH_READY, "", 0, "OK - 1 of 1 partitions ready, 1 models"),
        (partition_pb2.PARTITION_HEALTH_STARTING, "", 1, "WARNING - partition gpu0 is starting"),
        (partition_pb2.PARTITION_HEALTH_READY, "low disk", 1, "WARNING - low disk"),
        (partition_pb2.PARTITION_HEALTH_FAILED, "low disk", 2, "CRITICAL - partition gpu0 failed"),
    ],
)
def test_check_is_one_line_and_a_level(
    node: ScriptedNode,
    gpuctl: Run,
    health: partition_pb2.PartitionHealth.ValueType,
    warning: str,
    code: int,
    words: str,
) -> None:
    node.partitions[0].health = health
    if warning:
        node.node.warnings.append(warning)
    done = gpuctl("status", "--check")
    assert (done.code, done.err) == (code, "")
    assert done.out.startswith(f"HOTBAY {words}")
    assert done.out.count("\n") == 1
    _, _, figures = done.out.partition(" | ")
    assert "models_active=1" in figures
    assert f"host_store={2 * GIB}B;;;0;{16 * GIB}" in figures


def test_check_finds_lost_gpus_and_no_partitions_critical(node: ScriptedNode, gpuctl: Run) -> None:
    node.gpus.unreachable.append("GPU-7")
    assert "GPU GPU-7 does not answer" in gpuctl("status", "--check").out
    node.gpus.ClearField("unreachable")
    node.partitions.clear()
    assert gpuctl("status", "--check").code == 2


def test_check_of_a_daemon_that_is_not_well_is_critical(node: ScriptedNode, gpuctl: Run) -> None:
    node.refusals["ListGpus"] = Refusal(Reason.INTERNAL, "NVML\nbroke")
    done = gpuctl("status", "--check")
    assert (done.code, done.out) == (2, "HOTBAY CRITICAL - NVML broke\n")


def test_ps_shows_what_each_model_is_doing(gpuctl: Run) -> None:
    header, row = gpuctl("ps").out.splitlines()
    assert header.split()[:3] == ["MODEL", "STATE", "PARTITION"]
    assert row.split() == [
        "prose@1", "ACTIVE", "gpu0", "1.00", "GiB", "512", "MiB", "25%", "3", "1", "0",
    ]  # fmt: skip


def test_ps_of_an_empty_node(node: ScriptedNode, gpuctl: Run) -> None:
    node.partitions[0].ClearField("models")
    assert gpuctl("ps").out == "no model is on a partition; see gpuctl load\n"


def test_json_of_lists_is_the_apis_list_message(node: ScriptedNode, gpuctl: Run) -> None:
    models = Parse(gpuctl("model", "ls", "-o", "json").out, model_pb2.ListModelsResponse())
    assert {model.name: model for model in models.models} == node.models
    partitions = Parse(gpuctl("ps", "-o", "json").out, partition_pb2.ListPartitionsResponse())
    assert list(partitions.partitions) == node.partitions
    gpuctl("swap", "prose", "code")
    operations = Parse(gpuctl("op", "ls", "-o", "json").out, ListOperationsResponse())
    assert list(operations.operations) == list(node.operations.values())
    model = Parse(gpuctl("model", "show", "prose", "-o", "json").out, model_pb2.Model())
    assert model == node.models["prose"]


def test_models_in_a_table_and_alone(gpuctl: Run) -> None:
    header, code, prose = gpuctl("model", "ls").out.splitlines()
    assert header.startswith("MODEL")
    assert code.split()[:5] == ["code@1", "STANDBY", "-", "llama", "28.3M"]
    assert prose.split()[-1] == "production"
    shown = gpuctl("model", "show", "prose@1").out
    assert "prose, version 1 by default" in shown
    assert "production = 1" in shown
    assert "ACTIVE on gpu0" in shown
    assert "4.00 KiB of KV per token" in shown


def test_registering_names_an_absolute_directory(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl("model", "register", "new", "some/where", "--version", "3")
    assert done.code == 0
    assert done.out.startswith("new@3 registered: llama, 28.3M parameters, 1.00 GiB on disk")
    request = node.last(model_pb2.RegisterModelRequest)
    assert request.directory.startswith("/")
    assert request.directory.endswith("/some/where")
    assert "could be registered" in gpuctl("model", "register", "new", "/m", "--dry-run").out


def test_long_names_are_neither_cut_nor_wrapped_in_a_pipe(node: ScriptedNode, gpuctl: Run) -> None:
    name = "m" * 300
    node.models = {name: model_pb2.Model(name=name, versions=[version(name, 1)])}
    assert gpuctl("model", "ls").out.splitlines()[1].startswith(f"{name}@1 ")


def test_markup_and_control_characters_in_names_stay_text(node: ScriptedNode, gpuctl: Run) -> None:
    node.partitions[0].models[0].model = "[red]x[/red]\x1b[2J\nnext"
    row = gpuctl("ps").out.splitlines()[1]
    assert row.startswith(r"[red]x[/red]\x1b[2J next ")


def test_operations_listed_and_shown(node: ScriptedNode, gpuctl: Run) -> None:
    assert gpuctl("op", "ls").out == "no operations\n"
    gpuctl("swap", "prose", "code")
    node.outcome = Refusal(Reason.CORRUPT_WEIGHTS, "bad")
    gpuctl("load", "code")
    node.held = True
    gpuctl("load", "code", "--no-wait")
    rows = gpuctl("op", "ls").out.splitlines()[1:]
    assert rows[0].split()[:8] == [
        "0001", "swap", "prose", "->", "code", "gpu0", "COMMITTED", "api",
    ]  # fmt: skip
    assert rows[0].endswith(" done")
    assert rows[1].endswith(" CORRUPT_WEIGHTS: bad")
    assert rows[2].endswith(" running")
    assert [row.split()[0] for row in gpuctl("op", "ls", "--running").out.splitlines()[1:]] == [
        "0003"
    ]
    shown = gpuctl("op", "show", "0003").out
    assert "stage:     copying, 256 MiB of 1.00 GiB" in shown
    assert "result:    running" in shown


def test_an_operations_plan_and_ledger(node: ScriptedNode, gpuctl: Run) -> None:
    gpuctl("swap", "prose", "code")
    operation = node.operations["operations/0001"]
    metadata = model_pb2.OperationMetadata()
    operation.metadata.Unpack(metadata)
    metadata.ledger.CopyFrom(ledger())
    metadata.plan.CopyFrom(
        common_pb2.SwapPlan(
            partition="gpu0", incoming="code@1", build_bytes=GIB, host_evictions=["old@1"],
            device_bytes_needed=3 * GIB, device_bytes_available=2 * GIB,
        )
    )  # fmt: skip
    operation.metadata.Pack(metadata)
    shown = gpuctl("op", "show", "operations/0001").out
    assert "copied:    1.00 GiB at 50.00 GB/s, 91% of the link's 55.00 GB/s" in shown
    assert "requests:  0 lost, 12 finished, 3 kept" in shown
    assert "3.00 GiB needed, 2.00 GiB available: DOES NOT FIT" in shown
    assert "evicts:    old@1 from host memory" in shown


def test_op_wait_ends_as_the_command_would_have(node: ScriptedNode, gpuctl: Run) -> None:
    gpuctl("swap", "prose", "code", "--no-wait")
    done = gpuctl("op", "wait", "0001")
    assert done.code == 0
    assert done.out.splitlines()[-1].startswith("swapped prose -> code on gpu0 in 0.41 s")
    node.outcome = Refusal(Reason.INSUFFICIENT_DEVICE_MEMORY, "no room")
    gpuctl("load", "code", "--no-wait")
    assert gpuctl("op", "wait", "0002").code == 7


def test_op_cancel(node: ScriptedNode, gpuctl: Run) -> None:
    node.held = True
    gpuctl("swap", "prose", "code", "--no-wait")
    done = gpuctl("op", "cancel", "0001")
    assert (done.code, done.out) == (
        0, "asked operations/0001 to stop; see gpuctl op show 0001\n",
    )  # fmt: skip
    assert gpuctl("op", "wait", "0001").code == 1
    node.refusals["CancelOperation"] = Refusal(Reason.NOT_CANCELLABLE, "too late")
    assert gpuctl("op", "cancel", "0001").code == 4


def snapshot() -> list[watch_pb2.WatchEvent | Refusal]:
    present = watch_pb2.WatchEvent(
        type=watch_pb2.EVENT_TYPE_PRESENT, revision=1, resume_token="t1", kind="model",
        name="prose@1", message="prose@1 is ACTIVE\x1b[1m",
    )  # fmt: skip
    synced = watch_pb2.WatchEvent(type=watch_pb2.EVENT_TYPE_SYNCED, revision=1, resume_token="t1")
    return [present, synced]


def test_events_without_follow_end_with_the_snapshot(node: ScriptedNode, gpuctl: Run) -> None:
    node.watches = [snapshot()]
    done = gpuctl("events", "--kind", "model", "--kind", "gpu")
    assert done.code == 0
    present, synced = done.out.splitlines()
    assert present.split()[1:] == ["present", "model", "prose@1", "prose@1", "is", r"ACTIVE\x1b[1m"]
    assert synced.split()[1:] == ["synced"]
    request = node.last(watch_pb2.WatchRequest)
    assert (list(request.kinds), request.resume_token) == (["model", "gpu"], "")


def test_events_after_a_token_are_followed(node: ScriptedNode, gpuctl: Run) -> None:
    changed = watch_pb2.WatchEvent(type=watch_pb2.EVENT_TYPE_CHANGED, resume_token="t2", name="x")
    node.watches = [[*snapshot(), changed, Refusal(Reason.INVALID_ARGUMENT, "enough")]]
    done = gpuctl("events", "--resume", "t0")
    assert done.code == 2  # the script's end, as nothing else ends it
    assert done.out.splitlines()[-1].split()[1:] == ["changed", "x"]
    assert node.last(watch_pb2.WatchRequest).resume_token == "t0"


def test_events_in_json_are_one_message_a_line(node: ScriptedNode, gpuctl: Run) -> None:
    node.watches = [snapshot()]
    lines = gpuctl("events", "-o", "json").out.splitlines()
    assert [Parse(line, watch_pb2.WatchEvent()) for line in lines] == snapshot()


def test_version_asks_nobody_unless_told_to(node: ScriptedNode, gpuctl: Run) -> None:
    assert gpuctl("version").out.startswith("gpuctl ")
    assert node.requests == []
    assert gpuctl("version", "--daemon").out.splitlines()[1] == "hotbayd 9.9.9 on testhost"
    assert json.loads(gpuctl("version", "--daemon", "-o", "json").out)["hotbayd"] == "9.9.9"


def test_pins_are_set_shown_and_taken_back(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl("pin", "prose", "--dry-run")
    assert (done.code, done.out) == (0, "prose could be pinned in host memory\n")
    assert not node.models["prose"].pinned
    assert gpuctl("pin", "prose").out == "prose is pinned in host memory\n"
    lines = gpuctl("model", "ls").out.splitlines()
    column = lines[0].index("PINNED")
    shown = {line.split("@")[0]: line[column:].split()[0] for line in lines[1:]}
    assert shown == {"prose": "yes", "code": "-"}
    assert "; pinned" in gpuctl("model", "show", "prose").out
    assert json.loads(gpuctl("unpin", "prose", "-o", "json").out)["name"] == "prose"
    assert not node.models["prose"].pinned
    missing = gpuctl("pin", "prosa")
    assert missing.code != 0
    assert "no model 'prosa'" in missing.err
