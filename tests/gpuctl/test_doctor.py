"""doctor: the daemon's report, and the one without a daemon."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf.json_format import Parse
from hotbay.v1 import doctor_pb2

from daemon.gpuctl import doctor
from tests.gpuctl.conftest import Run, in_process
from tests.support.scripted_node import ScriptedNode

WELL = doctor_pb2.Examination(
    checks=[
        doctor_pb2.Check(name="kernel", state=doctor_pb2.CHECK_STATE_OK, found="6.8"),
        doctor_pb2.Check(
            name="huge pages",
            state=doctor_pb2.CHECK_STATE_WARNING,
            found="4 KiB pages",
            mend="`sysctl x`",
        ),
    ]
)


def test_warnings_are_mended_but_not_counted(node: ScriptedNode, gpuctl: Run) -> None:
    node.examination = WELL
    done = gpuctl("doctor")
    assert (done.code, done.err) == (0, "")
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    assert rows == [
        "CHECK STATE FOUND",
        "kernel ok 6.8",
        "huge pages warning 4 KiB pages",
        "",
        "huge pages (warning): `sysctl x`",
    ]
    done = gpuctl("doctor", "-o", "json")
    assert (done.code, Parse(done.out, doctor_pb2.Examination())) == (0, WELL)


def test_what_is_missing_is_exit_code_1(node: ScriptedNode, gpuctl: Run) -> None:
    gone = doctor_pb2.Check(
        name="NVML", state=doctor_pb2.CHECK_STATE_MISSING, found="none", mend="a driver"
    )
    node.examination = doctor_pb2.Examination(checks=[gone])
    assert gpuctl("doctor").code == 1


def test_without_a_daemon_the_program_looks(tmp_path: Path) -> None:
    done = in_process(f"unix:{tmp_path}/control.sock")("doctor", "-o", "json")
    checks = json.loads(done.out)["checks"]
    assert done.code == 1
    assert [each["name"] for each in checks][:2] == ["hotbayd", "kernel"]
    assert checks[0]["state"] == "CHECK_STATE_MISSING"
    assert "systemctl start hotbayd" in checks[0]["mend"]
    assert str(tmp_path) in checks[-1]["found"]


def test_without_either_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DAEMON", ("/no/such/hotbayd",))
    done = in_process(f"unix:{tmp_path}/control.sock")("doctor")
    assert (done.code, done.out) == (6, "")
    assert "hotbayd --doctor does not answer either" in done.err
    # Another host's daemon: nothing here says anything of that host.
    assert in_process("127.0.0.1:1")("doctor").code == 6
