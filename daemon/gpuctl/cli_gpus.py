"""The commands of `gpuctl gpu`: names, arguments and help, and nothing else.

As in `daemon.gpuctl.cli`, each function brings in the module that does the work when it is run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.gpuctl.options import DryRunOption, RequestIdOption, command
from daemon.gpuctl.session import Session

GpuArgument = Annotated[str, typer.Argument(metavar="GPU", help="An index, gpu0, or a UUID.")]


def declare(app: typer.Typer) -> None:
    """Add the commands of `gpuctl gpu`."""

    @command(app, "health")
    def health(session: Session) -> int:
        """What is wrong with GPUs and instances; exits 0 when all are healthy, else 1."""
        from daemon.gpuctl import gpus

        return gpus.health(session)

    @command(app, "cordon")
    def cordon(
        session: Session,
        gpu: GpuArgument,
        reason: Annotated[str, typer.Option(help="Why; shown wherever it is refused.")] = "",
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
    ) -> None:
        """Keep new models and swaps off a GPU; what serves there goes on."""
        from daemon.gpuctl import gpus

        gpus.cordon(session, gpu, reason, request_id, dry_run)

    @command(app, "uncordon")
    def uncordon(
        session: Session,
        gpu: GpuArgument,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
    ) -> None:
        """Let models on again; where an operator was waited for, say that he has acted."""
        from daemon.gpuctl import gpus

        gpus.uncordon(session, gpu, request_id, dry_run)
