"""The commands of `gpuctl part`: names, arguments and help, and nothing else.

As in `daemon.gpuctl.cli`, each function brings in the module that does the work when it is run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.gpuctl.options import DryRunOption, RequestIdOption, WaitOption, command
from daemon.gpuctl.session import Session

LayoutFileOption = Annotated[
    str, typer.Option("--file", "-f", metavar="FILE", help="The layout file, or - for stdin.")
]

OptionalFileOption = Annotated[
    str, typer.Option("--file", "-f", metavar="FILE", help="A layout file, or - for stdin.")
]


def declare(app: typer.Typer) -> None:
    """Add the commands of `gpuctl part`."""
    _declare_views(app)
    _declare_files(app)


def _declare_views(app: typer.Typer) -> None:
    @command(app, "ls")
    def list_partitions(session: Session) -> None:
        """Partitions, and the GPU instances that are there without serving."""
        from daemon.gpuctl import layouts

        layouts.list_partitions(session)

    @command(app, "profiles")
    def profiles(session: Session) -> None:
        """What each GPU can be cut into."""
        from daemon.gpuctl import layouts

        layouts.profiles(session)

    @command(app, "export")
    def export(session: Session) -> None:
        """Print the present layout as a layout file."""
        from daemon.gpuctl import layouts

        layouts.export(session)


def _declare_files(app: typer.Typer) -> None:
    @command(app, "plan")
    def plan(session: Session, file: LayoutFileOption) -> None:
        """What a layout file would keep, create, destroy and move. Changes nothing."""
        from daemon.gpuctl import layouts

        layouts.plan(session, file)

    @command(app, "diff")
    def diff(session: Session, file: LayoutFileOption) -> int:
        """Only what would change; exits 0 when nothing would, 1 when something would."""
        from daemon.gpuctl import layouts

        return layouts.diff(session, file)

    @command(app, "apply")
    def apply(
        session: Session,
        plan_id: Annotated[
            str, typer.Argument(metavar="[PLAN_ID]", help="A plan that `part plan` has shown.")
        ] = "",
        file: OptionalFileOption = "",
        force: Annotated[
            bool, typer.Option("--force", help="End processes of others on what goes; needs --yes.")
        ] = False,
        yes: Annotated[
            bool, typer.Option("--yes", help="With --force: end those that are listed.")
        ] = False,
        dry_run: DryRunOption = False,
        wait: WaitOption = True,
        request_id: RequestIdOption = "",
    ) -> None:
        """Cut the GPUs as a layout file, or a plan that was shown, says. Ctrl-C leaves it going."""
        from daemon.gpuctl import layouts

        how = layouts.How(dry_run=dry_run, wait=wait, request_id=request_id, force=force, yes=yes)
        layouts.apply(session, plan_id, file, how)

    @command(app, "assert")
    def assert_layout(session: Session, file: LayoutFileOption) -> int:
        """Exit 0 when the GPUs are cut as a layout file says, else 1 with what differs."""
        from daemon.gpuctl import layouts

        return layouts.assert_layout(session, file)
