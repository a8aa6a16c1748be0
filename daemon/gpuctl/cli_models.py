"""The commands that make models known, and keep them: names, arguments and help, and nothing else.

As in `daemon.gpuctl.cli`, each function brings in the module that does the work when it is run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.gpuctl.options import DryRunOption, ModelArgument, RequestIdOption, command
from daemon.gpuctl.session import Session


def declare(app: typer.Typer) -> None:
    """Add the commands of `gpuctl model`."""

    @command(app, "register")
    def register(
        session: Session,
        name: Annotated[str, typer.Argument(help="What to call it.")],
        directory: Annotated[str, typer.Argument(help="Its checkpoint, on the daemon's host.")],
        version: Annotated[int, typer.Option(min=0, help="0: one more than the newest.")] = 0,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
    ) -> None:
        """Make a checkpoint known; nothing is loaded."""
        from daemon.gpuctl import models

        models.register(session, name, directory, version, request_id, dry_run)

    @command(app, "ls")
    def list_models(session: Session) -> None:
        """All versions of all models."""
        from daemon.gpuctl import models

        models.list_models(session)

    @command(app, "show")
    def show(session: Session, model: ModelArgument) -> None:
        """Everything about one model."""
        from daemon.gpuctl import models

        models.show(session, model)


def declare_pull(app: typer.Typer) -> None:
    """Add `gpuctl pull`."""

    @command(app, "pull")
    def pull(
        session: Session,
        repository: Annotated[
            str, typer.Argument(metavar="REPO[@REVISION]", help="OWNER/NAME on the hub.")
        ],
        name: Annotated[
            str, typer.Option("--as", metavar="NAME", help="What to call it; by default NAME.")
        ] = "",
        token_file: Annotated[
            str,
            typer.Option(metavar="F", help="Holds a token for the hub; on the daemon's host."),
        ] = "",
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
        wait: Annotated[
            bool,
            typer.Option(
                "--wait/--no-wait",
                " /--detach",
                help="Wait for the end, or print the operation's name.",
            ),
        ] = True,
    ) -> None:
        """Fetch a model from a hub (Hugging Face or a mirror) and register it."""
        from daemon.gpuctl import moves, pulls

        how = moves.How(request_id, dry_run, wait)
        pulls.pull(session, repository, name, token_file, how)


def declare_pins(app: typer.Typer) -> None:
    """Add `gpuctl pin` and `gpuctl unpin`."""

    @command(app, "pin")
    def pin(
        session: Session,
        model: ModelArgument,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
    ) -> None:
        """Keep a model's image in host memory, whatever else needs the memory."""
        from daemon.gpuctl import models

        models.pin(session, model, True, request_id, dry_run)

    @command(app, "unpin")
    def unpin(
        session: Session,
        model: ModelArgument,
        request_id: RequestIdOption = "",
        dry_run: DryRunOption = False,
    ) -> None:
        """Let a model's image make room for others again."""
        from daemon.gpuctl import models

        models.pin(session, model, False, request_id, dry_run)
