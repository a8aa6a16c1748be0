"""The commands of `gpuctl sim`: names, arguments and help, and nothing else.

As in `daemon.gpuctl.cli`, each function brings in the module that does the work when it is run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.gpuctl.options import command
from daemon.gpuctl.session import Session

TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="gpu0, a UUID, or an instance as gpu0/3g.71gb@4.")
]
GpuArgument = Annotated[str, typer.Argument(metavar="GPU", help="An index, gpu0, or a UUID.")]
FunctionArgument = Annotated[
    str, typer.Argument(metavar="FUNCTION", help="Of NVML, such as nvmlGpuInstanceDestroy.")
]


def declare(app: typer.Typer, inject: typer.Typer) -> None:
    """Add the commands of `gpuctl sim` and of `gpuctl sim inject`."""
    app.add_typer(inject, name="inject")
    _declare_gpus(inject)
    _declare_calls(inject)

    @command(app, "clear")
    def clear(session: Session) -> None:
        """Take all trouble away: faults, delays, fields, lost GPUs."""
        from daemon.gpuctl import simulation

        simulation.clear(session)


def _declare_gpus(inject: typer.Typer) -> None:
    @command(inject, "xid")
    def xid(
        session: Session,
        target: TargetArgument,
        number: Annotated[int, typer.Argument(min=1, help="Such as 94.")],
    ) -> None:
        """The driver reports an XID."""
        from daemon.gpuctl import simulation

        simulation.xid(session, target, number)

    @command(inject, "lost")
    def lost(session: Session, gpu: GpuArgument) -> None:
        """The GPU falls off the bus: every call answers GPU_IS_LOST."""
        from daemon.gpuctl import simulation

        simulation.lost(session, gpu)

    @command(inject, "reset")
    def reset(session: Session, gpu: GpuArgument) -> None:
        """The GPU wants a reset, and refuses to be cut anew before it."""
        from daemon.gpuctl import simulation

        simulation.pending_reset(session, gpu)

    @command(inject, "health")
    def health(
        session: Session,
        gpu: GpuArgument,
        recovery: Annotated[
            str | None,
            typer.Option(metavar="ACTION", help="none, gpu-reset, ..., or untold."),
        ] = None,
        ecc: Annotated[
            int | None, typer.Option(min=0, metavar="N", help="Uncorrected memory errors.")
        ] = None,
        rows_pending: Annotated[bool | None, typer.Option(help="Rows wait for a reset.")] = None,
        rows_failed: Annotated[bool | None, typer.Option(help="No spare row is left.")] = None,
        thermal: Annotated[bool | None, typer.Option(help="Slowed down by heat.")] = None,
        power: Annotated[bool | None, typer.Option(help="Slowed down by its supply.")] = None,
    ) -> None:
        """Change what the driver tells of a GPU's health."""
        from daemon.gpuctl import simulation

        fields = simulation.Fields(recovery, ecc, rows_pending, rows_failed, thermal, power)
        simulation.health(session, gpu, fields)


def _declare_calls(inject: typer.Typer) -> None:
    @command(inject, "failure")
    def failure(
        session: Session,
        function: FunctionArgument,
        error: Annotated[
            str, typer.Argument(help="NO_PERMISSION, IN_USE, TIMEOUT, ... as NVML names it.")
        ],
        gpu: Annotated[str, typer.Option(metavar="GPU", help="On this one; by default any.")] = "",
        after: Annotated[int, typer.Option(min=0, metavar="N", help="N calls pass first.")] = 0,
        times: Annotated[int, typer.Option(min=0, metavar="N", help="N calls fail; 0: all.")] = 0,
    ) -> None:
        """Calls of an NVML function (`any`: of all) fail."""
        from daemon.gpuctl import simulation

        simulation.failure(session, "" if function == "any" else function, error, gpu, after, times)

    @command(inject, "delay")
    def delay(
        session: Session,
        function: FunctionArgument,
        seconds: Annotated[float, typer.Argument(min=0.0, metavar="S")],
    ) -> None:
        """Calls of an NVML function take longer; 0 takes that back."""
        from daemon.gpuctl import simulation

        simulation.delay(session, function, seconds)
