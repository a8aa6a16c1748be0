"""The commands of `gpuctl plan`, and `gpuctl part defrag`: names, arguments and help.

As in `daemon.gpuctl.cli`, each function brings in the module that does the work when it is run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.gpuctl.options import command
from daemon.gpuctl.session import Session


def declare(app: typer.Typer) -> None:
    """Add the commands of `gpuctl plan`."""
    app.callback()(_group)

    @command(app, "place")
    def place(
        session: Session,
        file: Annotated[
            str,
            typer.Option("--file", "-f", metavar="FILE", help="The models file, or - for stdin."),
        ],
        layout: Annotated[
            str,
            typer.Option(
                metavar="FILE", help="Write the layout there, for `part apply -f`; - for stdout."
            ),
        ] = "",
    ) -> int:
        """A layout and a place for each model; exits 1 when one has none. Changes nothing."""
        from daemon.gpuctl import placing

        return placing.place(session, file, layout)


def declare_defragmentation(app: typer.Typer) -> None:
    """Add `defrag` to the commands of `gpuctl part`."""

    @command(app, "defrag")
    def defragment(
        session: Session,
        worth: Annotated[
            float,
            typer.Option(
                min=0.0,
                metavar="SECONDS",
                help="How long a model may be away for each GiB that becomes of use; 0: one.",
            ),
        ] = 0.0,
    ) -> None:
        """Which instances are worth moving; shows a plan that `part apply` takes by its id."""
        from daemon.gpuctl import placing

        placing.defragment(session, 1000 * worth)


def _group() -> None:
    """A group even with one command: its name is said."""
