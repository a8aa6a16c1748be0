"""The command tree: names, arguments and help, and nothing else.

Each function here only brings in the module that does the work, so that `gpuctl --help` and every
usage error answer without loading grpc, protobuf or rich.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from daemon.gpuctl import cli_gpus, cli_layouts, cli_models, cli_moves, cli_placing, cli_simulation
from daemon.gpuctl.complete import completion_script
from daemon.gpuctl.exits import Exit
from daemon.gpuctl.options import (
    ModelArgument,
    OperationArgument,
    RequestIdOption,
    WaitOption,
    command,
)
from daemon.gpuctl.session import Session


class Shell(StrEnum):
    """Shells that completion is written for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


SETTINGS = {"help_option_names": ["-h", "--help"]}


def _group(help_text: str, *, root: bool = False) -> typer.Typer:
    # Plain help: rich takes longer to load than the rest of the program.
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
        add_completion=root,
    )


def build() -> typer.Typer:
    """The whole tree."""
    app = _group("Steer the models and GPU partitions of a Hotbay node.", root=True)
    _declare_views(app)
    _declare_doctor(app)
    models = _group("Register and look at models.")
    cli_models.declare(models)
    app.add_typer(models, name="model")
    layouts = _group("Look at how GPUs are cut, and plan how they could be.")
    cli_layouts.declare(layouts)
    cli_placing.declare_defragmentation(layouts)
    app.add_typer(layouts, name="part")
    placing = _group("Plan which models go where.")
    cli_placing.declare(placing)
    app.add_typer(placing, name="plan")
    gpus = _group("Look at GPUs' health, and keep models off a GPU.")
    cli_gpus.declare(gpus)
    app.add_typer(gpus, name="gpu")
    simulation = _group("Make trouble on a simulated node.")
    cli_simulation.declare(simulation, _group("Put trouble upon the simulated driver."))
    app.add_typer(simulation, name="sim")
    cli_models.declare_pull(app)
    cli_moves.declare(app)
    cli_models.declare_pins(app)
    _declare_calibrate(app)
    _declare_run(app)
    operations = _group("Look at, wait for and cancel operations.")
    _declare_operations(operations)
    app.add_typer(operations, name="op")
    return app


def _declare_views(app: typer.Typer) -> None:
    @command(app, "status")
    def status(
        session: Session,
        check: Annotated[
            bool, typer.Option("--check", help="One line and exit code 0, 1 or 2, for monitoring.")
        ] = False,
    ) -> int:
        """The node on one screen: daemon, GPUs, partitions, models, warnings."""
        from daemon.gpuctl import nodes

        if check:
            return nodes.check(session)
        nodes.status(session)
        return Exit.OK

    @command(app, "ps")
    def ps(session: Session) -> None:
        """Models on partitions, and what each is doing."""
        from daemon.gpuctl import nodes

        nodes.processes(session)

    @command(app, "events")
    def events(
        session: Session,
        follow: Annotated[
            bool, typer.Option("--follow", "-f", help="Go on with changes until Ctrl-C.")
        ] = False,
        kind: Annotated[
            list[str] | None,
            typer.Option(help="model, partition, operation, process or gpu; repeatable."),
        ] = None,
        resume: Annotated[
            str, typer.Option(metavar="TOKEN", help="Follow from the event with this token.")
        ] = "",
    ) -> None:
        """What there is, and with -f what changes."""
        from daemon.gpuctl import events as commands

        commands.events(session, follow=follow, kinds=kind or (), resume_token=resume)

    @command(app, "version")
    def version(
        session: Session,
        daemon: Annotated[bool, typer.Option("--daemon", help="Ask the daemon as well.")] = False,
    ) -> None:
        """The version of this program."""
        from daemon.gpuctl import versions

        versions.version(session, with_daemon=daemon)

    @app.command("completion")
    def completion(shell: Shell) -> None:
        """Print the completion script of a shell: eval "$(gpuctl completion bash)"."""
        print(completion_script(shell.value))


def _declare_calibrate(app: typer.Typer) -> None:
    @command(app, "calibrate")
    def calibrate(
        session: Session,
        partition: Annotated[str, typer.Argument(help="A partition; all of them if none.")] = "",
        request_id: RequestIdOption = "",
        wait: WaitOption = True,
    ) -> None:
        """Measure the links over which weights are copied; plans count with them."""
        from daemon.gpuctl import nodes

        nodes.calibrate(session, partition, request_id, wait)


def _declare_run(app: typer.Typer) -> None:
    @command(app, "run")
    def run(
        session: Session,
        model: ModelArgument,
        prompt: Annotated[str, typer.Argument(help="The prompt, or - for standard input.")],
        system: Annotated[str | None, typer.Option(help="A system message.")] = None,
        raw: Annotated[
            bool, typer.Option("--raw", help="Continue the text; no chat template.")
        ] = False,
        max_tokens: Annotated[int | None, typer.Option(min=1, metavar="N")] = None,
        temperature: Annotated[float | None, typer.Option(min=0.0, metavar="T")] = None,
        seed: Annotated[int | None, typer.Option(metavar="N")] = None,
    ) -> None:
        """Send one prompt to a model and print the answer as it comes."""
        from daemon.gpuctl import chat

        text = chat.read_prompt(prompt)
        ask = chat.Ask(model, text, raw, system, max_tokens, temperature, seed)
        chat.run_prompt(session, ask)


def _declare_doctor(app: typer.Typer) -> None:
    @command(app, "doctor")
    def doctor(session: Session) -> int:
        """What the host lacks, and what mends it; exits 1 if something is missing."""
        from daemon.gpuctl import doctor as commands

        return commands.doctor(session)


def _declare_operations(app: typer.Typer) -> None:
    @command(app, "ls")
    def list_operations(
        session: Session,
        running: Annotated[bool, typer.Option("--running", help="Only what still runs.")] = False,
    ) -> None:
        """All operations the daemon remembers."""
        from daemon.gpuctl import operations

        operations.list_operations(session, running)

    @command(app, "show")
    def show(session: Session, operation: OperationArgument) -> None:
        """Where one operation stands, its plan and its ledger."""
        from daemon.gpuctl import operations

        operations.show(session, operation)

    @command(app, "wait")
    def wait(session: Session, operation: OperationArgument) -> None:
        """Wait for an operation; exits as the command that began it would have."""
        from daemon.gpuctl import operations

        operations.wait(session, operation)

    @command(app, "cancel")
    def cancel(session: Session, operation: OperationArgument) -> None:
        """Ask an operation to stop; what was before is restored."""
        from daemon.gpuctl import operations

        operations.cancel(session, operation)
