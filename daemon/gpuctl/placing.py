"""plan place and part defrag: models on a node, and partitions that are worth moving.

Reads, asks and prints; a file is only carried to the daemon, which alone knows what it means.
"""

from __future__ import annotations

from pathlib import Path

from hotbay.v1 import placement_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.errors import CommandFailed
from daemon.gpuctl.exits import Exit
from daemon.gpuctl.layouts import read_file, show_plan
from daemon.gpuctl.output import Column, print_json, print_table
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import NOTHING, one_line, share, size

PLACE_COLUMNS = (
    Column("MODEL"), Column("TENANT"), Column("PARTITION"), Column("MEMORY", right=True),
    Column("MS/TOKEN", right=True), Column("ASKED", right=True), Column("BESIDE"),
)  # fmt: skip
DEFRAGMENTATION_COLUMNS = (
    Column("GPU"), Column("FRAGMENTATION"), Column("GAINS", right=True),
    Column("MODELS AWAY", right=True), Column("WORTH IT"), Column("MOVES"),
)  # fmt: skip


def place(session: Session, file: str, layout: str) -> int:
    """`gpuctl plan place`: exit code 0 when every model has a place, else 1."""
    source = "standard input" if file == "-" else file
    answer = session.client.plan_placement(read_file(file), source=source)
    if layout:
        _write(layout, answer.layout)
    if session.json:
        print_json(answer)
    elif layout != "-":
        _show(answer)
        if answer.layout:
            written = layout or "FILE"
            hint = "" if layout else "; --layout FILE writes the layout"
            print_line(f"then: gpuctl part apply -f {one_line(written)}{hint}")
    return Exit.FAILED if answer.left_out else Exit.OK


def _write(layout: str, text: str) -> None:
    if not text:
        raise CommandFailed("no model has a place: there is no layout to write", Exit.FAILED)
    if layout == "-":
        print_line(text.rstrip())
        return
    try:
        Path(layout).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"cannot write {layout}: {error.strerror}", Exit.USAGE) from error


def _show(answer: placement_pb2.PlacementPlan) -> None:
    rows = [
        [
            each.model,
            each.tenant or NOTHING,
            each.partition,
            size(each.memory_bytes),
            f"{each.predicted_ms_per_token:.1f}" if each.predicted_ms_per_token else NOTHING,
            f"{each.ms_per_token:g}" if each.ms_per_token else NOTHING,
            ", ".join(each.beside) or NOTHING,
        ]
        for each in answer.placed
    ]
    print_table(PLACE_COLUMNS, rows, "no model has a place")
    for each in answer.left_out:
        print_line()
        print_line(one_line(f"{each.model} (line {each.line}) has no place: {each.reason}"))
        print_line(one_line(f"  {each.remedy}"))
    print_line()
    for gpu in answer.gpus:
        filled = f"{size(gpu.used_bytes)} of {size(gpu.memory_bytes)} promised"
        before, after = 100 * gpu.fragmentation_before, 100 * gpu.fragmentation_after
        print_line(f"gpu{gpu.index}: {filled}, fragmentation {before:.0f}% now, {after:.0f}% then")
    placed, all_ = len(answer.placed), len(answer.placed) + len(answer.left_out)
    value = share(answer.value, answer.value_asked)
    print_line(f"{placed} of {all_} models have a place, {value} of the value")


def defragment(session: Session, worth_ms_per_gib: float) -> None:
    """`gpuctl part defrag`."""
    answer = session.client.plan_defragmentation(worth_ms_per_gib=worth_ms_per_gib)
    if session.json:
        print_json(answer)
        return
    rows = [
        [
            f"gpu{gpu.index}",
            f"{100 * gpu.fragmentation_before:.0f}% to {100 * gpu.fragmentation_after:.0f}%",
            size(gpu.gained_bytes),
            f"{gpu.cost_ms / 1000:.1f} s",
            "yes" if gpu.worth_it else "no",
            ", ".join(gpu.move) or NOTHING,
        ]
        for gpu in answer.gpus
    ]
    print_table(DEFRAGMENTATION_COLUMNS, rows, "no GPU can be less fragmented than it is")
    if not rows:
        return
    worth_s = answer.worth_ms_per_gib / 1000
    print_line(f"a GiB that becomes of use is worth {worth_s:g} s of one model's absence")
    print_line()
    if not answer.plan.changes:
        print_line("nothing is worth moving; --worth SECONDS says what a GiB is worth")
        return
    show_plan(answer.plan)
    print_line(f"then: gpuctl part apply {answer.plan.plan_id}")
