"""The commands that change what a model is doing: names, arguments and help, and nothing else.

As in `daemon.gpuctl.cli`, each function brings in the module that does the work when it is run.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from daemon.gpuctl.options import (
    CanaryOption,
    DrainTimeoutOption,
    DryRunOption,
    IncomingArgument,
    LayersOption,
    ModelArgument,
    NoCanaryOption,
    OutgoingArgument,
    PartitionOption,
    QueueOption,
    RequestIdOption,
    WaitOption,
    WeightsBytesOption,
    command,
)
from daemon.gpuctl.session import Session


class InFlightChoice(StrEnum):
    """What to do with running requests."""

    DRAIN = "drain"
    PRESERVE = "preserve"
    RECOMPUTE = "recompute"
    ABORT = "abort"


InFlightOption = Annotated[
    InFlightChoice | None,
    typer.Option(
        "--in-flight",
        help="Finish running requests for the drain timeout and preserve the rest, preserve them "
        "all with their KV, compute them again later, or end them. "
        "By default as the daemon is configured.",
    ),
]


def declare(app: typer.Typer) -> None:
    """Add the commands."""
    _declare_coming(app)
    _declare_going(app)
    _declare_serving(app)


def _declare_coming(app: typer.Typer) -> None:
    @command(app, "load")
    def load(
        session: Session,
        model: ModelArgument,
        standby: Annotated[
            bool, typer.Option("--standby", help="Only bring it to host memory.")
        ] = False,
        partition: PartitionOption = "",
        queue: QueueOption = False,
        canary: CanaryOption = "",
        no_canary: NoCanaryOption = False,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
        wait: WaitOption = True,
    ) -> None:
        """Make a model ACTIVE where it fits, else leave it STANDBY."""
        from daemon.gpuctl import moves

        how = moves.How(request_id, dry_run, wait)
        moves.load(
            session,
            model,
            partition,
            how,
            standby=standby,
            queue=queue,
            canary=canary,
            forget_canary=no_canary,
        )

    @command(app, "stage")
    def stage(
        session: Session,
        model: ModelArgument,
        partition: PartitionOption = "",
        layers: LayersOption = 0,
        weights_bytes: WeightsBytesOption = 0,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
        wait: WaitOption = True,
    ) -> None:
        """Put a model's weights into spare memory; a swap to it copies nothing, or the rest."""
        from daemon.gpuctl import moves

        how = moves.How(request_id, dry_run, wait)
        moves.stage(session, model, partition, layers, weights_bytes, how)


def _declare_going(app: typer.Typer) -> None:
    @command(app, "unload")
    def unload(
        session: Session,
        model: ModelArgument,
        evict: Annotated[
            bool, typer.Option("--evict", help="Also drop it from host memory.")
        ] = False,
        in_flight: InFlightOption = None,
        drain_timeout: DrainTimeoutOption = None,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
        wait: WaitOption = True,
    ) -> None:
        """Take a model off its partition."""
        from daemon.gpuctl import moves

        how = moves.How(request_id, dry_run, wait)
        moves.unload(session, model, moves.in_flight(in_flight), drain_timeout, evict, how)

    @command(app, "swap")
    def swap(
        session: Session,
        outgoing: OutgoingArgument,
        incoming: IncomingArgument,
        partition: PartitionOption = "",
        in_flight: InFlightOption = None,
        drain_timeout: DrainTimeoutOption = None,
        queue: QueueOption = False,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
        wait: WaitOption = True,
    ) -> None:
        """Take A out of service on its partition and put B in, as one transaction."""
        from daemon.gpuctl import moves

        how = moves.How(request_id, dry_run, wait)
        policy = moves.in_flight(in_flight)
        moves.swap(session, outgoing, incoming, partition, policy, drain_timeout, queue, how)


def _declare_serving(app: typer.Typer) -> None:
    @command(app, "drain")
    def drain(
        session: Session,
        model: ModelArgument,
        in_flight: InFlightOption = None,
        drain_timeout: DrainTimeoutOption = None,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
        wait: WaitOption = True,
    ) -> None:
        """Stop admitting requests for a model; its weights stay."""
        from daemon.gpuctl import moves

        how = moves.How(request_id, dry_run, wait)
        moves.drain(session, model, moves.in_flight(in_flight), drain_timeout, how)

    @command(app, "resume")
    def resume(
        session: Session,
        model: ModelArgument,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
        wait: WaitOption = True,
    ) -> None:
        """Let a drained model serve again."""
        from daemon.gpuctl import moves

        moves.resume(session, model, moves.How(request_id, dry_run, wait))
