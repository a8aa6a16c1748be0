"""The options that every command has, and the words that arguments complete to.

`command` declares a function as a command: the function takes a Session first and its own arguments
after it, and the options common to all are added here, so that they are written once and may stand
anywhere after the command's name. Nothing here loads grpc, protobuf or rich.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from daemon.gpuctl import complete
from daemon.gpuctl.session import Output, Session, endpoint_or_default, run

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        envvar="HOTBAY_ENDPOINT",
        help="The daemon: unix:/path or host:port. By default its control socket on this host.",
    ),
]
OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="json is the API's message, for programs.")
]
TimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        min=0.001,
        metavar="S",
        help="Seconds to wait at most; an operation goes on after it (exit code 8).",
    ),
]

ModelArgument = Annotated[
    str,
    typer.Argument(help="name, name@version or name@label", autocompletion=complete.models),
]
OutgoingArgument = Annotated[
    str, typer.Argument(metavar="A", help="The model to leave.", autocompletion=complete.models)
]
IncomingArgument = Annotated[
    str, typer.Argument(metavar="B", help="The model to come.", autocompletion=complete.models)
]
OperationArgument = Annotated[
    str,
    typer.Argument(
        metavar="OPERATION", help="operations/ID or ID", autocompletion=complete.operations
    ),
]
PartitionOption = Annotated[
    str,
    typer.Option("--partition", "-p", metavar="P", autocompletion=complete.partitions),
]
DrainTimeoutOption = Annotated[
    float | None,
    typer.Option("--drain-timeout", min=0.0, metavar="S", help="Seconds to let requests finish."),
]
LayersOption = Annotated[
    int,
    typer.Option("--layers", min=0, metavar="N", help="Only the weights up to the Nth layer."),
]
WeightsBytesOption = Annotated[
    int,
    typer.Option("--bytes", min=0, metavar="BYTES", help="Only so many of the first bytes."),
]
QueueOption = Annotated[
    bool,
    typer.Option("--queue", help="Wait for what changes it now, instead of being refused."),
]
CanaryOption = Annotated[
    str,
    typer.Option(
        "--canary",
        metavar="TEXT",
        help="Record the greedy answer to TEXT; it must be the same whenever the model comes in.",
    ),
]
NoCanaryOption = Annotated[bool, typer.Option("--no-canary", help="Have no canary any more.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait for the end, or print the operation's name.")
]
RequestIdOption = Annotated[
    str, typer.Option("--request-id", metavar="ID", help="Makes the call safe to repeat.")
]

COMMON = (
    ("endpoint", EndpointOption, None),
    ("output", OutputOption, Output.TABLE),
    ("timeout", TimeoutOption, None),
)


def command(
    app: typer.Typer, name: str
) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Declare a function of a Session and further arguments as the command `name`."""

    def declare(function: Callable[..., int | None]) -> Callable[..., int | None]:
        app.command(name, help=inspect.getdoc(function))(_with_common_options(function))
        return function

    return declare


def _with_common_options(function: Callable[..., int | None]) -> Callable[..., None]:
    """`function` without its Session, with the common options, ending in an exit code."""
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in COMMON
    ]

    def call(**values: Any) -> None:
        session = Session(
            endpoint=endpoint_or_default(values.pop("endpoint")),
            output=values.pop("output"),
            timeout_s=values.pop("timeout"),
        )
        raise typer.Exit(run(session, lambda: function(session, **values)))

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + common
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call
