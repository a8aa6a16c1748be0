"""A progress bar for one operation, on standard error, and only on a terminal.

It shows the stage, the bytes moved, the requests left or the step of a change of layout, from the
operation's own metadata. Where standard error is not a terminal it shows nothing at all, so that
logs stay readable.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hotbay.status import operation_metadata
from hotbay.v1 import model_pb2

from daemon.gpuctl.text import one_line, size, word

if TYPE_CHECKING:
    from google.longrunning.operations_proto_pb2 import Operation
    from rich.progress import Progress, TaskID


def stage_word(metadata: model_pb2.OperationMetadata) -> str:
    """The stage as a word: `COPYING`."""
    return word(model_pb2.OperationStage.Name(metadata.stage), "OPERATION_STAGE_")


def standing(metadata: model_pb2.OperationMetadata) -> str:
    """Where an operation stands, in a few words."""
    parts = [stage_word(metadata).lower().replace("_", " ")]
    if metadata.bytes_total:
        parts.append(f"{size(metadata.bytes_done)} of {size(metadata.bytes_total)}")
    if metadata.requests_left:
        parts.append(f"{metadata.requests_left} requests left")
    if metadata.kind == "layout" and metadata.message:
        parts.append(metadata.message)
    return one_line(", ".join(parts))


class Bar:
    """Shows the operation it is updated with, until it is left."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def shown(self) -> bool:
        """Whether anybody sees it; if not, updates need not be asked for."""
        return self._wanted

    def __enter__(self) -> Self:
        if self._wanted:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.fields[standing]}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[passed]}", markup=False),
                console=Console(file=sys.stderr, markup=False, highlight=False),
                transient=True,
            )
            self._task = self._progress.add_task("", total=None, standing="", passed="")
            self._progress.start()
        return self

    def update(self, operation: Operation) -> None:
        """Show where the operation stands now."""
        if self._progress is None or self._task is None:
            return
        metadata = operation_metadata(operation)
        total = metadata.bytes_total or None
        self._progress.update(
            self._task,
            total=total,
            completed=metadata.bytes_done,
            standing=standing(metadata),
            passed=f"{self._progress.tasks[0].elapsed or 0:.1f} s",
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
