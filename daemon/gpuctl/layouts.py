"""part: how GPUs are cut, what they could be cut into, and how a layout file becomes so.

Reads, asks and prints; a file is only carried to the daemon, which alone knows what it means.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from google.longrunning.operations_proto_pb2 import Operation
from hotbay.operations import operation_response
from hotbay.v1 import node_pb2, partition_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.errors import CommandFailed
from daemon.gpuctl.exits import Exit
from daemon.gpuctl.follow import follow
from daemon.gpuctl.output import Column, as_dict, print_json, print_table
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import NOTHING, one_line, size, word

LAYOUT_BYTES_MAX = 1 << 20

PARTITION_COLUMNS = (
    Column("PARTITION"), Column("KIND"), Column("GPU"), Column("MEMORY", right=True),
    Column("SM", right=True), Column("STATE"),
)  # fmt: skip
PROFILE_COLUMNS = (
    Column("GPU"), Column("PROFILE"), Column("MEMORY", right=True), Column("SM", right=True),
    Column("SLICES", right=True), Column("SLOTS", right=True), Column("AT MOST", right=True),
    Column("STARTS"),
)  # fmt: skip
HOLDER_COLUMNS = (Column("PID", right=True), Column("ON"), Column("OWNER"), Column("COMMAND"))
PHASES = ("plan", "drain", "cut", "commit", "start")
PLAN_COLUMNS = (Column("DO"), Column("PARTITION"), Column("MODELS"))


def list_partitions(session: Session) -> None:
    """`gpuctl part ls`."""
    partitions = session.client.partitions()
    gpus = session.client.gpus()
    if session.json:
        listed = partition_pb2.ListPartitionsResponse(partitions=partitions)
        fields = {"partitions": as_dict(listed)["partitions"], "gpus": as_dict(gpus)["gpus"]}
        print(json.dumps(fields, indent=2))
        return
    index = {gpu.uuid: str(gpu.index) for gpu in gpus.gpus}
    rows = [
        [
            each.id,
            word(partition_pb2.PartitionKind.Name(each.kind), "PARTITION_KIND_").lower(),
            index.get(each.gpu, NOTHING),
            size(each.memory_bytes),
            str(each.multiprocessors or NOTHING),
            word(partition_pb2.PartitionHealth.Name(each.health), "PARTITION_HEALTH_"),
        ]
        for each in partitions
    ]
    serving = {each.id for each in partitions}
    rows += [
        _instance_row(gpu, each, shared=any(name.startswith(f"{each.id}/") for name in serving))
        for gpu in gpus.gpus
        for each in gpu.instances
        if each.id not in serving
    ]
    print_table(PARTITION_COLUMNS, rows, "no partitions")
    for gpu in gpus.gpus:
        if gpu.instances_hidden:
            print_line(f"warning: gpu{gpu.index}: the daemon may not see its instances")


def _instance_row(gpu: node_pb2.Gpu, each: node_pb2.GpuInstance, *, shared: bool) -> list[str]:
    memory, multiprocessors = size(each.memory_bytes), str(each.multiprocessors)
    state = "shared" if shared else "not serving"
    return [each.id, "mig", str(gpu.index), memory, multiprocessors, state]


def profiles(session: Session) -> None:
    """`gpuctl part profiles`."""
    answer = session.client.profiles()
    if session.json:
        print_json(answer)
        return
    rows = [
        [
            str(gpu.index),
            each.name,
            size(each.memory_bytes),
            str(each.multiprocessors),
            f"{each.compute_slices}/{gpu.compute_slices}",
            f"{each.memory_slots}/{gpu.memory_slots}",
            str(each.instances_max),
            " ".join(str(start) for start in each.starts),
        ]
        for gpu in answer.gpus
        for each in gpu.profiles
    ]
    print_table(PROFILE_COLUMNS, rows, "no GPU of this node can be cut into instances")


def plan(session: Session, file: str) -> None:
    """`gpuctl part plan`."""
    answer = _ask(session, file)
    if session.json:
        print_json(answer)
        return
    show_plan(answer)


def show_plan(answer: partition_pb2.LayoutPlan) -> None:
    """A plan of a layout, step by step."""
    rows = [[action, name, note] for action, name, note in _steps(answer)]
    print_table(PLAN_COLUMNS, rows, "the file asks for nothing")
    print_line()
    for gpu in answer.gpus:
        print_line(_gpu_line(gpu))
    if answer.changes:
        downtime = f"{answer.predicted_downtime_ms / 1000:.1f} s" if answer.move else "none"
        print_line(f"{answer.plan_id}: predicted downtime of models: {downtime}")
    else:
        print_line(f"{answer.plan_id}: nothing to do")


def diff(session: Session, file: str) -> int:
    """`gpuctl part diff`: 0 when nothing would change, else 1."""
    answer = _ask(session, file)
    if session.json:
        print_json(answer)
    else:
        for gpu in answer.gpus:
            if gpu.mig_change:
                reset = ", with a reset" if gpu.reset else ""
                print_line(f"~ gpu{gpu.index} {gpu.mig_change} MIG mode{reset}")
            for name in gpu.destroy:
                print_line(one_line(f"- {name}{' (models move)' if name in gpu.move else ''}"))
            for name in gpu.create:
                print_line(one_line(f"+ {name}"))
    return Exit.FAILED if answer.changes else Exit.OK


@dataclass(frozen=True)
class How:
    """How a layout is applied. With `force` and `yes` processes of others are ended."""

    dry_run: bool
    wait: bool
    request_id: str
    force: bool = False
    yes: bool = False


def apply(session: Session, plan_id: str, file: str, how: How) -> None:
    """`gpuctl part apply`: shows what a file's plan is, then has exactly that plan carried out."""
    if bool(plan_id) == bool(file):
        raise CommandFailed("say either a plan's id or a file with -f, and one of them", Exit.USAGE)
    if file:
        planned = _ask(session, file)
        plan_id = planned.plan_id
        if not session.json:
            show_plan(planned)
            print_line()
    end_pids = _whom_to_end(session, plan_id, named=not file, how=how) if how.force else ()
    operation = session.client.apply_layout(
        plan_id,
        # Without anybody to end there is nothing to force.
        force=bool(end_pids),
        end_pids=end_pids,
        request_id=how.request_id,
        validate_only=how.dry_run,
    )
    if how.dry_run:
        if session.json:
            print_json(operation)
        else:
            print_line(f"{plan_id} can be applied; nothing was changed")
        return
    follow(session, operation, wait=how.wait, describe=_applied, undo=lambda operation: "")


def _whom_to_end(session: Session, plan_id: str, *, named: bool, how: How) -> tuple[int, ...]:
    """List the processes that --force would end; their pids when it may.

    A plan that is named was seen before; of a file somebody has to say --yes.
    """
    tried = session.client.apply_layout(plan_id, force=True, validate_only=True)
    response = operation_response(tried)
    assert isinstance(response, partition_pb2.ApplyLayoutResponse)
    if response.ended and not session.json:
        rows = [
            [
                str(each.pid),
                each.partition,
                each.owner or NOTHING,
                one_line(each.command or NOTHING),
            ]
            for each in response.ended
        ]
        print_table(HOLDER_COLUMNS, rows, "")
        print_line()
    if response.ended and not (how.yes or named or how.dry_run):
        pids = ", ".join(str(each.pid) for each in response.ended)
        raise CommandFailed(
            f"{len(response.ended)} processes of others would be ended (pid {pids}); nothing was "
            f"done. Say --yes to end them, or name the plan: gpuctl part apply {plan_id} --force",
            Exit.CONFLICT,
        )
    return tuple(each.pid for each in response.ended)


def _applied(operation: Operation) -> str:
    response = operation_response(operation)
    if not isinstance(response, partition_pb2.ApplyLayoutResponse):
        return "done"
    parts = [
        f"{word} {', '.join(names)}"
        for word, names in (("destroyed", response.destroyed), ("created", response.created))
        if names
    ]
    if response.ended:
        parts.append(f"ended pid {', '.join(str(each.pid) for each in response.ended)}")
    if response.moved:
        parts.append(f"{', '.join(response.moved)} lost their place and are brought back")
    if parts and response.phases_ms:
        took = response.phases_ms
        words = (f"{name} {took[name] / 1000:.2f} s" for name in PHASES if name in took)
        parts.append(", ".join(words))
    return one_line("; ".join(parts) or response.message or "the layout was there already")


def assert_layout(session: Session, file: str) -> int:
    """`gpuctl part assert`: as `diff`, and says so when all is as the file has it."""
    code = diff(session, file)
    if code == Exit.OK and not session.json:
        print_line("as the file says")
    return code


def export(session: Session) -> None:
    """`gpuctl part export`."""
    layout = session.client.layout()
    if session.json:
        print_json(partition_pb2.Layout(text=layout))
        return
    print_line(layout.rstrip())


def _ask(session: Session, file: str) -> partition_pb2.LayoutPlan:
    source = "standard input" if file == "-" else file
    return session.client.plan_layout(read_file(file), source=source)


def read_file(file: str) -> str:
    """The text of a file, or of standard input for `-`."""
    try:
        if file == "-":
            content = sys.stdin.buffer.read(LAYOUT_BYTES_MAX + 1)
        else:
            with Path(file).open("rb") as opened:
                content = opened.read(LAYOUT_BYTES_MAX + 1)
        if len(content) > LAYOUT_BYTES_MAX:
            raise CommandFailed(f"{file} is larger than {LAYOUT_BYTES_MAX} bytes", Exit.USAGE)
        return content.decode()
    except OSError as error:
        raise CommandFailed(f"cannot read {file}: {error.strerror}", Exit.USAGE) from error
    except UnicodeDecodeError as error:
        raise CommandFailed(f"{file} is not UTF-8: {error}", Exit.USAGE) from error


def _steps(plan: partition_pb2.LayoutPlan) -> list[tuple[str, str, str]]:
    """What is done to each partition, GPU by GPU, in the order in which it would be done."""
    steps = []
    for gpu in plan.gpus:
        steps += [("leave alone", name, "not ours") for name in gpu.foreign]
        cleared = dict.fromkeys(gpu.cleared, "of others; must be empty")
        steps += [("keep", name, cleared.get(name, NOTHING)) for name in gpu.keep]
        steps += [
            ("destroy", name, "must move" if name in gpu.move else cleared.get(name, NOTHING))
            for name in gpu.destroy
        ]
        if gpu.mig_change:
            reset = "resets the GPU" if gpu.reset else NOTHING
            steps.append((f"{gpu.mig_change} MIG", f"gpu{gpu.index}", reset))
        steps += [("create", name, NOTHING) for name in gpu.create]
    return steps


def _gpu_line(gpu: partition_pb2.GpuLayoutPlan) -> str:
    before, after = gpu.fragmentation_before, gpu.fragmentation_after
    return f"gpu{gpu.index}: fragmentation {100 * before:.0f}% now, {100 * after:.0f}% then"
