"""gpu and sim: what people read of health, and trouble for simulated nodes alone."""

from __future__ import annotations

import json

import pytest
from hotbay.reasons import Reason
from hotbay.v1 import health_pb2, node_pb2, simulation_pb2

from tests.gpuctl.conftest import Run
from tests.support.scripted_node import ScriptedNode
from tests.support.scripted_values import Refusal


def unit(name: str, state: int, **fields: object) -> health_pb2.UnitHealth:
    return health_pb2.UnitHealth(unit=name, state=state, **fields)  # type: ignore[arg-type]


def test_health_lists_every_unit_and_what_the_driver_says(node: ScriptedNode, gpuctl: Run) -> None:
    gpu = node.gpus.gpus[0]
    gpu.units.append(unit("gpu0", health_pb2.HEALTH_STATE_HEALTHY))
    done = gpuctl("gpu", "health")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1].split() == ["gpu0", "healthy", "-", "-", "-", "-"]
    gpu.units.append(
        unit(
            "gpu0/3g.71gb@4",
            health_pb2.HEALTH_STATE_NEEDS_OPERATOR,
            reason="XID 95: memory error",
            action="reset",
            xids=[95, 154],
        )
    )
    gpu.readings.CopyFrom(
        health_pb2.HealthReadings(
            recovery_action="drain_and_reset", uncorrected_errors=2, rows_pending=True,
            rows_failed=True, thermal_slowdown=True, power_slowdown=True,
        )
    )  # fmt: skip
    gpu.cordoned, gpu.cordon_reason = True, "fan\x1b[31m"
    done = gpuctl("gpu", "health")
    assert done.code == 1
    assert "gpu0/3g.71gb@4  needs operator" in done.out
    assert "95 154  reset   XID 95: memory error" in done.out
    for words in ("asks for drain and reset", "2 uncorrected", "next reset", "replaced", "heat"):
        assert words in done.out
    assert "cordoned: fan" in done.out
    assert "\x1b" not in done.out
    told = json.loads(gpuctl("gpu", "health", "-o", "json").out)
    assert told["gpus"][0]["units"][1]["xids"] == [95, 154]


def test_a_lost_gpu_is_not_healthy(node: ScriptedNode, gpuctl: Run) -> None:
    gpu = node.gpus.gpus[0]
    gpu.units.append(unit("gpu0", health_pb2.HEALTH_STATE_HEALTHY))
    gpu.health = "lost: it fell off the bus"
    done = gpuctl("gpu", "health")
    assert (done.code, "gpu0: lost: it fell off the bus" in done.out) == (1, True)


def test_cordon_and_uncordon(node: ScriptedNode, gpuctl: Run) -> None:
    done = gpuctl("gpu", "cordon", "gpu0", "--reason", "a fan", "--request-id", "one")
    assert (done.code, done.out) == (0, "gpu0 takes no new models\n")
    request = node.last(node_pb2.CordonGpuRequest)
    assert (request.gpu, request.reason, request.request_id) == ("gpu0", "a fan", "one")
    done = gpuctl("gpu", "uncordon", "0", "--dry-run")
    assert (done.code, done.out) == (0, "gpu0 can be uncordoned\n")
    assert node.last(node_pb2.UncordonGpuRequest).validate_only
    assert node.last(node_pb2.UncordonGpuRequest).request_id
    node.refusals["CordonGpu"] = Refusal(Reason.GPU_NOT_FOUND, "there is no GPU 'gpu7'")
    done = gpuctl("gpu", "cordon", "gpu7")
    assert done.code != 0
    assert "there is no GPU 'gpu7'" in done.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("xid", "gpu0/3g.71gb@4", "94"), {"target": "gpu0/3g.71gb@4", "xid": {"number": 94}}),
        (("lost", "1"), {"target": "1", "vanish": {}}),
        (("reset", "gpu0"), {"target": "gpu0", "pending_reset": {}}),
        (
            ("failure", "nvmlDeviceGetName", "NO_PERMISSION", "--after", "2", "--times", "3"),
            {
                "failure": {
                    "function": "nvmlDeviceGetName",
                    "error": "NO_PERMISSION",
                    "after_calls": 2,
                    "times": 3,
                }
            },
        ),
        (
            ("failure", "any", "GPU_IS_LOST", "--gpu", "gpu0"),
            {"target": "gpu0", "failure": {"error": "GPU_IS_LOST"}},
        ),
        (
            ("delay", "nvmlGpuInstanceDestroy", "1"),
            {"delay": {"function": "nvmlGpuInstanceDestroy", "delay_s": 1.0}},
        ),
        (
            ("health", "gpu0", "--recovery", "gpu-reset", "--no-rows-pending", "--ecc", "0"),
            {
                "target": "gpu0",
                "fields": {
                    "recovery_action": "gpu-reset",
                    "rows_pending": False,
                    "uncorrected_errors": 0,
                },
            },
        ),
    ],
)
def test_inject_asks_for_what_was_said(
    node: ScriptedNode, gpuctl: Run, words: tuple[str, ...], expected: dict[str, object]
) -> None:
    done = gpuctl("sim", "inject", *words)
    assert (done.code, done.out) == (0, "it was done\n"), done.err
    wanted = simulation_pb2.InjectRequest(**expected)  # type: ignore[arg-type]
    assert node.last(simulation_pb2.InjectRequest) == wanted


def test_clear(node: ScriptedNode, gpuctl: Run) -> None:
    assert gpuctl("sim", "clear").code == 0
    assert node.calls[-1] == "Clear"


def test_real_gpus_are_left_alone(node: ScriptedNode, gpuctl: Run) -> None:
    node.node.simulated = False
    for words in (("inject", "lost", "gpu0"), ("clear",)):
        done = gpuctl("sim", *words)
        assert (done.code, done.out) == (1, "")
        assert "the GPUs of testhost are real" in done.err
        assert "--simulate" in done.err
    assert node.calls == ["GetNode", "GetNode"]
