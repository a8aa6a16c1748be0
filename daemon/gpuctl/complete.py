"""What the shell offers after Tab: names that exist on the node now.

A completion that makes the user wait is worse than none: the daemon has `DEADLINE_S` to answer, and
any failure offers nothing. grpc is loaded only when a completion is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import typer
from hotbay.errors import HotbayError

from daemon.gpuctl.session import endpoint_or_default
from daemon.gpuctl.suggest import model_names

if TYPE_CHECKING:
    from hotbay.client import Client

DEADLINE_S = 0.2


def models(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of models; versions and labels once an @ is typed."""
    found = _ask(ctx, lambda client: model_names(client.models()))
    exact = "@" in incomplete
    return [name for name in found if name.startswith(incomplete) and (exact or "@" not in name)]


def partitions(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of partitions."""
    found = _ask(ctx, lambda client: (one.id for one in client.partitions()))
    return [name for name in found if name.startswith(incomplete)]


def operations(ctx: typer.Context, incomplete: str) -> list[str]:
    """Ids of operations, or their full names once `operations/` is begun."""
    found = _ask(ctx, lambda client: (one.name for one in client.operations()))
    if not incomplete.startswith("operations/"):
        found = [name.removeprefix("operations/") for name in found]
    return [name for name in found if name.startswith(incomplete)]


def completion_script(shell: str) -> str:
    """The script with which a shell asks `gpuctl` for completions."""
    # typer offers the script through an option only; packages want it from a command.
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    return str(
        get_completion_script(prog_name="gpuctl", complete_var="_GPUCTL_COMPLETE", shell=shell)
    )


def _ask(ctx: typer.Context, question: Callable[[Client], Iterable[str]]) -> list[str]:
    from hotbay.client import Client

    endpoint = endpoint_or_default(ctx.params.get("endpoint"))
    try:
        with Client(endpoint, timeout_s=DEADLINE_S) as client:
            return sorted(question(client))
    except HotbayError:
        return []
