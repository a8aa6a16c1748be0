"""doctor: what the host offers and lacks, each with the line that mends it.

A daemon that runs looks at its own host. Where none answers on this host, the program hotbayd is
asked to look without starting one, as whoever runs gpuctl and with its default configuration; the
daemon that is not there then stands first in the report, as what is missing.
"""

from __future__ import annotations

import subprocess
import sys

from google.protobuf.json_format import Parse, ParseError
from hotbay.errors import Unreachable
from hotbay.v1 import doctor_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.errors import CommandFailed
from daemon.gpuctl.exits import Exit
from daemon.gpuctl.output import Column, print_json, print_table
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import one_line, word

DAEMON = (sys.executable, "-m", "daemon.control.main")
LOOK_TIMEOUT_S = 60.0
COLUMNS = (Column("CHECK"), Column("STATE"), Column("FOUND"))


def doctor(session: Session) -> int:
    """`gpuctl doctor`: 0, or 1 when something is missing."""
    try:
        told = session.client.examine()
    except Unreachable as error:
        if not session.endpoint.startswith("unix:"):
            raise
        told = _without_a_daemon(session, error)
    if session.json:
        print_json(told)
    else:
        _show(told)
    states = {each.state for each in told.checks}
    return Exit.FAILED if doctor_pb2.CHECK_STATE_MISSING in states else Exit.OK


def _show(told: doctor_pb2.Examination) -> None:
    rows = [[each.name, _state(each), one_line(each.found)] for each in told.checks]
    print_table(COLUMNS, rows, "nothing was looked at")
    mends = [each for each in told.checks if each.mend]
    if mends:
        print_line()
    for each in mends:
        print_line(one_line(f"{each.name} ({_state(each)}): {each.mend}"))


def _state(check: doctor_pb2.Check) -> str:
    return word(doctor_pb2.CheckState.Name(check.state), "CHECK_STATE_").lower()


def _without_a_daemon(session: Session, error: Unreachable) -> doctor_pb2.Examination:
    try:
        done = subprocess.run(
            (*DAEMON, "--doctor", "json", "--runtime-dir", _runtime_dir(session.endpoint)),
            capture_output=True,
            timeout=LOOK_TIMEOUT_S,
            check=False,
        )
        told = Parse(done.stdout, doctor_pb2.Examination())
    except (OSError, subprocess.TimeoutExpired, ParseError) as failure:
        raise CommandFailed(
            f"{error.message}; and hotbayd --doctor does not answer either: {failure}",
            Exit.UNREACHABLE,
        ) from error
    told.checks.insert(
        0,
        doctor_pb2.Check(
            name="hotbayd",
            state=doctor_pb2.CHECK_STATE_MISSING,
            found=f"does not answer at {session.endpoint}; what follows holds for its default "
            "configuration",
            mend="`systemctl start hotbayd`, or `hotbayd --simulate h200x1` without a GPU; "
            "`hotbayd --doctor --config FILE` looks with another configuration",
        ),
    )
    return told


def _runtime_dir(endpoint: str) -> str:
    return endpoint.removeprefix("unix:").rpartition("/")[0] or "."
