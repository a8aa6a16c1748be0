"""status, ps and calibrate: what there is and how it does.

Reads and prints. `status --check` says the same in one line with the exit code that monitoring
systems expect, and never fails in any other way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from google.longrunning.operations_proto_pb2 import Operation
from google.protobuf import timestamp_pb2
from hotbay.errors import HotbayError
from hotbay.v1 import common_pb2, model_pb2, node_pb2, partition_pb2

from daemon.gpuctl.console import print_line
from daemon.gpuctl.exits import Check
from daemon.gpuctl.follow import follow
from daemon.gpuctl.models import state_word
from daemon.gpuctl.output import Column, as_dict, print_json, print_table
from daemon.gpuctl.session import Session
from daemon.gpuctl.text import NOTHING, age, count, one_line, rate, share, size, word

GPU_COLUMNS = (
    Column("GPU"), Column("PRODUCT"), Column("MEMORY", right=True), Column("USED", right=True),
    Column("MIG"), Column("HEALTH"),
)  # fmt: skip
PARTITION_COLUMNS = (
    Column("PARTITION"), Column("KIND"), Column("MEMORY", right=True), Column("FREE", right=True),
    Column("HEALTH"), Column("MODELS"),
)  # fmt: skip
PS_COLUMNS = (
    Column("MODEL"), Column("STATE"), Column("PARTITION"), Column("WEIGHTS", right=True),
    Column("KV", right=True), Column("KV USED", right=True), Column("RUNNING", right=True),
    Column("WAITING", right=True), Column("TOKENS", right=True),
)  # fmt: skip


def calibrate(session: Session, partition: str, request_id: str, wait: bool) -> None:
    """`gpuctl calibrate`."""
    session.names = [partition]
    operation = session.client.calibrate(partition, request_id=request_id)

    def describe(done: Operation) -> str:
        response = node_pb2.CalibrateResponse()
        done.response.Unpack(response)
        links = (
            f"{each.partition} {rate(each.host_to_device_bytes_per_second)} to the device, "
            f"{rate(each.device_to_host_bytes_per_second)} from it"
            for each in response.links
        )
        return "measured " + "; ".join(links)

    follow(session, operation, wait=wait, describe=describe, undo=lambda _: "")


@dataclass(frozen=True)
class Picture:
    """The node at one moment, as far as four calls make one."""

    node: node_pb2.Node
    gpus: node_pb2.ListGpusResponse
    partitions: list[partition_pb2.Partition]
    models: list[model_pb2.Model]


def take_picture(session: Session) -> Picture:
    """Ask for everything `status` shows."""
    client = session.client
    return Picture(client.node(), client.gpus(), client.partitions(), client.models())


def status(session: Session) -> None:
    """`gpuctl status`."""
    picture = take_picture(session)
    if session.json:
        print(json.dumps(_picture_fields(picture), indent=2))
        return
    for line in _head(picture.node):
        print_line(line)
    print_line()
    gpus = [_gpu_row(gpu) for gpu in picture.gpus.gpus]
    gpus += [
        [uuid, NOTHING, NOTHING, NOTHING, NOTHING, "LOST"] for uuid in picture.gpus.unreachable
    ]
    print_table(GPU_COLUMNS, gpus, "no GPUs")
    print_line()
    rows = [_partition_row(partition) for partition in picture.partitions]
    print_table(PARTITION_COLUMNS, rows, "no partitions")
    print_line()
    print_line(_models_line(picture.models))
    for warning in picture.node.warnings:
        print_line(f"warning: {warning}")


def check(session: Session) -> int:
    """`gpuctl status --check`: one line, and 0, 1 or 2."""
    try:
        picture = take_picture(session)
    except HotbayError as error:
        print_line(one_line(f"HOTBAY CRITICAL - {error.message}"))
        return Check.CRITICAL
    critical = list(_critical(picture))
    warnings = list(_warnings(picture))
    level = Check.CRITICAL if critical else Check.WARNING if warnings else Check.OK
    ready = sum(p.health == partition_pb2.PARTITION_HEALTH_READY for p in picture.partitions)
    active = sum(
        residence.state == common_pb2.MODEL_STATE_ACTIVE
        for partition in picture.partitions
        for residence in partition.models
    )
    sentence = "; ".join(critical + warnings) or (
        f"{ready} of {len(picture.partitions)} partitions ready, {active} models active"
    )
    store = picture.node.host_store
    figures = (
        f"partitions_ready={ready};;;0;{len(picture.partitions)} models_active={active} "
        f"host_store={store.used_bytes}B;;;0;{store.budget_bytes}"
    )
    print_line(one_line(f"HOTBAY {level.name} - {sentence} | {figures}"))
    return level


def processes(session: Session) -> None:
    """`gpuctl ps`: the models on partitions, and what each is doing."""
    partitions = session.client.partitions()
    if session.json:
        print_json(partition_pb2.ListPartitionsResponse(partitions=partitions))
        return
    rows = [
        _residence_row(partition.id, residence)
        for partition in partitions
        for residence in partition.models
    ]
    print_table(PS_COLUMNS, rows, "no model is on a partition; see gpuctl load")


def ago(moment: timestamp_pb2.Timestamp) -> str:
    """How long ago a moment was; nothing for one that is not set."""
    if not moment.seconds:
        return NOTHING
    return age(time.time() - moment.seconds - moment.nanos / 1e9)


def _picture_fields(picture: Picture) -> dict[str, object]:
    """Each value is a message of the API; the names around them are ours."""
    partitions = partition_pb2.ListPartitionsResponse(partitions=picture.partitions)
    models = model_pb2.ListModelsResponse(models=picture.models)
    return {
        "node": as_dict(picture.node),
        "gpus": as_dict(picture.gpus)["gpus"],
        "unreachable": list(picture.gpus.unreachable),
        "partitions": as_dict(partitions)["partitions"],
        "models": as_dict(models)["models"],
    }


def _head(node: node_pb2.Node) -> Iterator[str]:
    simulated = ", simulated" if node.simulated else ""
    yield (
        f"hotbayd {node.version} on {node.hostname}{simulated}, up {ago(node.start_time)}, "
        f"driver {node.driver_version or NOTHING}"
    )
    store = node.host_store
    yield (
        f"host store {size(store.used_bytes)} of {size(store.budget_bytes)} in "
        f"{len(store.images)} images, {size(store.spare_bytes)} spare; "
        f"{node.operations_running} operations running"
    )
    yield f"new images in {store.pages or NOTHING}"
    yield f"HTTP at {node.http_address or NOTHING}, gRPC at {node.grpc_address or NOTHING}"


def _gpu_row(gpu: node_pb2.Gpu) -> list[str]:
    health = gpu.health or NOTHING
    return [
        str(gpu.index),
        gpu.product,
        size(gpu.memory_bytes),
        size(gpu.memory_used_bytes),
        "on" if gpu.mig_enabled else "off" if gpu.mig_capable else NOTHING,
        f"{health}, cordoned" if gpu.cordoned else health,
    ]


def _partition_row(partition: partition_pb2.Partition) -> list[str]:
    models = [f"{one.model} {state_word(one.state)}" for one in partition.models]
    return [
        partition.id,
        word(partition_pb2.PartitionKind.Name(partition.kind), "PARTITION_KIND_").lower(),
        size(partition.memory_bytes),
        size(partition.memory_free_bytes),
        _health_word(partition),
        ", ".join(models) or NOTHING,
    ]


def _health_word(partition: partition_pb2.Partition) -> str:
    return word(partition_pb2.PartitionHealth.Name(partition.health), "PARTITION_HEALTH_")


def _residence_row(partition: str, one: partition_pb2.Residence) -> list[str]:
    return [
        one.model,
        state_word(one.state),
        partition,
        size(one.weights_bytes),
        size(one.kv_bytes),
        share(one.kv_used_bytes, one.kv_bytes),
        str(one.running),
        str(one.waiting),
        count(one.prompt_tokens_total + one.generation_tokens_total),
    ]


def _models_line(models: list[model_pb2.Model]) -> str:
    states = [state_word(version.state) for model in models for version in model.versions]
    tally = [f"{states.count(state)} {state}" for state in sorted(set(states))]
    return f"{len(models)} models registered" + (f": {', '.join(tally)}" if tally else "")


def _critical(picture: Picture) -> Iterator[str]:
    for uuid in picture.gpus.unreachable:
        yield f"GPU {uuid} does not answer"
    for partition in picture.partitions:
        if partition.health == partition_pb2.PARTITION_HEALTH_FAILED:
            yield f"partition {partition.id} failed: {partition.health_reason}"
    if not picture.partitions:
        yield "no partitions"


def _warnings(picture: Picture) -> Iterator[str]:
    for partition in picture.partitions:
        if partition.health == partition_pb2.PARTITION_HEALTH_STARTING:
            yield f"partition {partition.id} is starting"
        for residence in partition.models:
            if residence.state == common_pb2.MODEL_STATE_FAILED:
                yield f"{residence.model} failed on {partition.id}: {residence.reason}"
    yield from picture.node.warnings
