"""gpu: how each GPU is, and keeping models off one."""

from __future__ import annotations

from collections.abc import Iterator

from hotbay.v1 import health_pb2, node_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.exits import Exit
from daemon.gpuctl.nodes import ago
from daemon.gpuctl.output import Column, print_json, print_table
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import NOTHING, one_line, word

HEALTH_COLUMNS = (
    Column("UNIT"), Column("STATE"), Column("SINCE"), Column("XIDS"), Column("ACTION"),
    Column("REASON"),
)  # fmt: skip


def health(session: Session) -> int:
    """`gpuctl gpu health`: 0 when every unit is healthy, else 1."""
    answer = session.client.gpus()
    sound = all(
        gpu.health == "ok" and each.state == health_pb2.HEALTH_STATE_HEALTHY
        for gpu in answer.gpus
        for each in gpu.units
    )
    if session.json:
        print_json(answer)
    else:
        rows = [_row(gpu, each) for gpu in answer.gpus for each in gpu.units]
        print_table(HEALTH_COLUMNS, rows, "no GPUs")
        for gpu in answer.gpus:
            for line in _notes(gpu):
                print_line(one_line(f"gpu{gpu.index}: {line}"))
    return Exit.OK if sound else Exit.FAILED


def _row(gpu: node_pb2.Gpu, each: health_pb2.UnitHealth) -> list[str]:
    state = word(health_pb2.HealthState.Name(each.state), "HEALTH_STATE_").lower()
    return [
        each.unit,
        state.replace("_", " "),
        ago(each.since),
        " ".join(map(str, each.xids)) or NOTHING,
        each.action or NOTHING,
        each.reason or NOTHING,
    ]


def _notes(gpu: node_pb2.Gpu) -> Iterator[str]:
    """What is worth knowing beside the states."""
    told = gpu.readings
    if gpu.health != "ok":
        yield gpu.health
    if gpu.cordoned:
        yield "cordoned" + (f": {gpu.cordon_reason}" if gpu.cordon_reason else "")
    if told.recovery_action not in ("", "none"):
        yield f"its driver asks for {told.recovery_action.replace('_', ' ')}"
    if told.uncorrected_errors:
        yield f"{told.uncorrected_errors} uncorrected memory errors since the driver was loaded"
    if told.rows_pending:
        yield "rows of its memory are remapped with the next reset"
    if told.rows_failed:
        yield "no spare row of its memory is left: have it replaced"
    if told.thermal_slowdown:
        yield "slowed down by heat"
    if told.power_slowdown:
        yield "slowed down by its power supply"


def cordon(session: Session, gpu: str, reason: str, request_id: str, dry_run: bool) -> None:
    """`gpuctl gpu cordon`."""
    answer = session.client.cordon_gpu(
        gpu, reason=reason, request_id=request_id, validate_only=dry_run
    )
    _say(session, answer, "takes no new models" if not dry_run else "can be cordoned")


def uncordon(session: Session, gpu: str, request_id: str, dry_run: bool) -> None:
    """`gpuctl gpu uncordon`."""
    answer = session.client.uncordon_gpu(gpu, request_id=request_id, validate_only=dry_run)
    _say(session, answer, "takes models again" if not dry_run else "can be uncordoned")


def _say(session: Session, gpu: node_pb2.Gpu, what: str) -> None:
    if session.json:
        print_json(gpu)
    else:
        print_line(f"gpu{gpu.index} {what}")
