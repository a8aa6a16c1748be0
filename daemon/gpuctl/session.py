"""One run of a command: where the daemon is, how to answer, and what to say when it ends.

It owns the client, opened when first asked for, and turns every ending (success, an error of the
daemon, Ctrl-C) into an exit code and a sentence on standard error. Ctrl-C never cancels: it leaves
the operation running and says its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from hotbay.endpoints import default_endpoint
from hotbay.errors import HotbayError, OperationFailed

from daemon.gpuctl.console import OutputClosed, complain, leave_output
from daemon.gpuctl.errors import CommandFailed
from daemon.gpuctl.exits import Exit, exit_of
from daemon.gpuctl.suggest import did_you_mean

if TYPE_CHECKING:
    from google.longrunning.operations_proto_pb2 import Operation
    from hotbay.client import Client

CALL_TIMEOUT_S = 10.0


class Output(StrEnum):
    """How to answer."""

    TABLE = "table"
    JSON = "json"


def endpoint_or_default(endpoint: str | None) -> str:
    """The address given, or that of the daemon which this user would run."""
    return endpoint or default_endpoint(os.getuid(), os.environ)


@dataclass
class Session:
    """What every command is given. `names` are the models and partitions the user wrote."""

    endpoint: str
    output: Output
    timeout_s: float | None
    following: Operation | None = None
    names: list[str] = field(default_factory=list)

    @cached_property
    def client(self) -> Client:
        """The daemon; connected at the first call."""
        from hotbay.client import Client

        call_timeout_s = CALL_TIMEOUT_S
        if self.timeout_s is not None:
            call_timeout_s = min(call_timeout_s, self.timeout_s)
        return Client(self.endpoint, timeout_s=call_timeout_s)

    @property
    def json(self) -> bool:
        """Whether a program reads the answer."""
        return self.output is Output.JSON

    def close(self) -> None:
        """Close the client, if there is one."""
        if "client" in self.__dict__:
            self.client.close()


def run(session: Session, body: Callable[[], int | None]) -> int:
    """Run a command's body; its exit code."""
    try:
        return body() or Exit.OK
    except KeyboardInterrupt:
        _say_detached(session)
        return Exit.DETACHED
    except (OutputClosed, BrokenPipeError):
        leave_output()
        return Exit.FAILED
    except CommandFailed as failure:
        complain(f"gpuctl: {failure}")
        return failure.code
    except HotbayError as error:
        _say_error(session, error)
        return exit_of(error)
    finally:
        session.close()


def _say_detached(session: Session) -> None:
    if session.following is None or session.following.done:
        complain("gpuctl: interrupted")
        return
    name = session.following.name
    short = name.removeprefix("operations/")
    complain(
        f"gpuctl: detached; {name} goes on\n"
        f"  wait for it:  gpuctl op wait {short}\n"
        f"  stop it:      gpuctl op cancel {short}"
    )


def _say_error(session: Session, error: HotbayError) -> None:
    lines = [f"gpuctl: {error.message}"]
    if isinstance(error, OperationFailed):
        outcome = "was rolled back" if error.rolled_back else "could NOT be rolled back"
        lines.append(f"  operation:   {error.operation.name} ({outcome})")
    if error.reason:
        figures = ", ".join(f"{name}={value}" for name, value in sorted(error.metadata.items()))
        lines.append(f"  reason:      {error.reason}" + (f" ({figures})" if figures else ""))
    # Without a reason no daemon spoke, and there is none to ask for names.
    guess = did_you_mean(session.client, session.names, error) if error.reason else ""
    if guess:
        lines.append(f"  {guess}")
    elif error.advice:
        lines.append(f"  what to do:  {error.advice}")
    if exit_of(error) is Exit.UNREACHABLE and not error.reason:
        lines.append(
            "  what to do:  start hotbayd, or say where it is with --endpoint or HOTBAY_ENDPOINT"
        )
    complain("\n".join(lines))
