"""sim: trouble for a simulated node. On a real one every command is refused before it is sent."""

from __future__ import annotations

from dataclasses import dataclass

from hotbay.v1 import simulation_pb2 as api

from daemon.gpuctl.console import print_line
from daemon.gpuctl.errors import CommandFailed
from daemon.gpuctl.exits import Exit
from daemon.gpuctl.output import print_json
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import one_line


@dataclass(frozen=True)
class Fields:
    """What the driver is to tell; None leaves it as it is."""

    recovery: str | None
    ecc: int | None
    rows_pending: bool | None
    rows_failed: bool | None
    thermal: bool | None
    power: bool | None


def xid(session: Session, target: str, number: int) -> None:
    """`gpuctl sim inject xid`."""
    _inject(session, api.InjectRequest(target=target, xid=api.Xid(number=number)))


def lost(session: Session, gpu: str) -> None:
    """`gpuctl sim inject lost`."""
    _inject(session, api.InjectRequest(target=gpu, vanish=api.Vanish()))


def pending_reset(session: Session, gpu: str) -> None:
    """`gpuctl sim inject reset`."""
    _inject(session, api.InjectRequest(target=gpu, pending_reset=api.PendingReset()))


def health(session: Session, gpu: str, fields: Fields) -> None:
    """`gpuctl sim inject health`."""
    message = api.HealthFields(
        recovery_action=fields.recovery,
        uncorrected_errors=fields.ecc,
        rows_pending=fields.rows_pending,
        rows_failed=fields.rows_failed,
        thermal_slowdown=fields.thermal,
        power_slowdown=fields.power,
    )
    _inject(session, api.InjectRequest(target=gpu, fields=message))


def failure(session: Session, function: str, error: str, gpu: str, after: int, times: int) -> None:
    """`gpuctl sim inject failure`."""
    message = api.CallFailure(function=function, error=error, after_calls=after, times=times)
    _inject(session, api.InjectRequest(target=gpu, failure=message))


def delay(session: Session, function: str, seconds: float) -> None:
    """`gpuctl sim inject delay`."""
    message = api.CallDelay(function=function, delay_s=seconds)
    _inject(session, api.InjectRequest(delay=message))


def clear(session: Session) -> None:
    """`gpuctl sim clear`."""
    _refuse_real_gpus(session)
    answer = session.client.clear_injections()
    if session.json:
        print_json(answer)
    else:
        print_line("the simulated driver is well again")


def _inject(session: Session, request: api.InjectRequest) -> None:
    _refuse_real_gpus(session)
    answer = session.client.inject(request)
    if session.json:
        print_json(answer)
    else:
        print_line(one_line(answer.message))


def _refuse_real_gpus(session: Session) -> None:
    node = session.client.node()
    if not node.simulated:
        raise CommandFailed(
            f"the GPUs of {node.hostname} are real, and no trouble is made for those: start a "
            "hotbayd with --simulate and name it with --endpoint",
            Exit.FAILED,
        )
