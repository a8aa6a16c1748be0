"""What of a resource is worth an event, and the sentence that people read in it.

Pure functions over the API's messages, for the watch alone.
"""

from __future__ import annotations

from typing import Any

from google.longrunning import operations_proto_pb2 as longrunning
from google.protobuf.message import Message
from hotbay.v1 import health_pb2, model_pb2, node_pb2, partition_pb2

MOVING_FIGURES = (
    "kv_used_bytes",
    "kv_bytes",
    "running",
    "waiting",
    "prompt_tokens_total",
    "generation_tokens_total",
    "preemptions_total",
    "preemptions_parked_total",
)


def steady(resource: Message) -> Message:
    """A copy without the figures that move all the time and are not worth an event each."""
    copy = type(resource)()
    copy.CopyFrom(resource)
    if isinstance(copy, partition_pb2.Partition):
        copy.ClearField("memory_free_bytes")
        for each in copy.models:
            for field in MOVING_FIGURES:
                each.ClearField(field)  # type: ignore[arg-type]
    elif isinstance(copy, model_pb2.Model):
        for version in copy.versions:
            version.ClearField("running")
            version.ClearField("waiting")
    elif isinstance(copy, node_pb2.Process):
        copy.ClearField("resident_bytes")
    elif isinstance(copy, node_pb2.Gpu):
        copy.ClearField("memory_used_bytes")
    return copy


def describe(name: str, resource: Message) -> str:
    """One sentence for people."""
    if isinstance(resource, model_pb2.Model):
        states = ", ".join(
            f"{each.key} {_word(model_pb2.ModelVersion, 'state', each.state)}"
            + (f" on {each.partition}" if each.partition else "")
            for each in resource.versions
        )
        return f"model {states}"
    if isinstance(resource, partition_pb2.Partition):
        health = _word(partition_pb2.Partition, "health", resource.health)
        models = ", ".join(each.model for each in resource.models) or "nothing"
        return f"partition {name} is {health} and holds {models}"
    if isinstance(resource, longrunning.Operation):
        metadata = model_pb2.OperationMetadata()
        resource.metadata.Unpack(metadata)
        models = " -> ".join(filter(None, (metadata.outgoing, metadata.incoming)))
        stage = _word(model_pb2.OperationMetadata, "stage", metadata.stage)
        verdict = f": {resource.error.message}" if resource.error.message else ""
        return f"{metadata.kind} of {models}: {stage}{verdict}"
    if isinstance(resource, node_pb2.Process):
        how = "adopted" if resource.adopted else "started"
        return f"{name} runs as pid {resource.pid} ({how})"
    assert isinstance(resource, node_pb2.Gpu)
    cordoned = ", cordoned" if resource.cordoned else ""
    units = [
        f"{each.unit} {_word(health_pb2.UnitHealth, 'state', each.state)}: {each.reason}"
        for each in resource.units
        if each.state != health_pb2.HEALTH_STATE_HEALTHY
    ]
    return "; ".join([f"GPU {name} is {resource.health}{cordoned}", *units])


def _word(message: Any, field: str, number: int) -> str:
    """An enum value without the prefix that protobuf wants."""
    names = message.DESCRIPTOR.fields_by_name[field].enum_type
    prefix = "".join(f"_{c}" if c.isupper() else c for c in names.name).lstrip("_").upper()
    return str(names.values_by_number[number].name).removeprefix(f"{prefix}_")
