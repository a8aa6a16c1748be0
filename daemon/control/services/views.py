"""The world as the API's messages: models, partitions, GPUs, processes, the host store.

It owns the translation and nothing else: functions from what hotbayd believes and what processes
reported to protobuf. Only the services and the watch use it.
"""

from __future__ import annotations

from hotbay.v1 import model_pb2, node_pb2, partition_pb2

from daemon.control.processes.child import ProcessInfo
from daemon.control.services import health
from daemon.control.services.answers import model_state, timestamp
from daemon.control.state.planning import kv_bytes_per_token
from daemon.control.state.records import Operation, Version
from daemon.control.state.world import World
from engine.link.control import EngineState
from partitioner.gpu import Gpu, GpuHealth
from partitioner.partition import Partition
from swap.huge_pages import describe


def model(world: World, name: str) -> model_pb2.Model:
    """A model with all its versions. Raises Refused (MODEL_NOT_FOUND)."""
    versions = world.registry.of(name)
    return model_pb2.Model(
        name=name,
        versions=[version(world, each) for each in versions],
        default_version=world.registry.default(name).version,
        labels=world.registry.labels(name),
        pinned=any(each.pinned for each in versions),
    )


def version(world: World, version: Version) -> model_pb2.ModelVersion:
    """A version with its state and what inspecting it told."""
    state, reason, partition = world.state(version)
    held = world.held.get(version.key)
    engine = world.engine(version.key)
    message = model_pb2.ModelVersion(
        version=version.version,
        key=version.key,
        directory=version.directory,
        state=model_state(state),
        reason=reason,
        partition=partition,
        digest=version.digest,
        create_time=timestamp(version.created_s),
        waiting=(held.requests if held else 0) + (engine.waiting if engine else 0),
        running=engine.running if engine else 0,
        pinned=version.pinned,
        staged_bytes=world.staged_bytes(version.key) if state == "STAGED" else 0,
        canary=version.canary.text if version.canary is not None else "",
    )
    facts = version.facts
    if facts is not None:
        message.family = facts.family
        message.parameters = facts.parameters
        message.layers = facts.layers
        message.vocabulary = facts.vocabulary
        message.context_tokens = facts.context_tokens
        message.checkpoint_bytes = facts.checkpoint_bytes
        message.image_bytes = facts.segment_bytes
        message.weights_bytes = facts.weights_bytes
        message.kv_bytes_per_token = kv_bytes_per_token(facts, world.config.worker)
    return message


def partition(world: World, each: Partition, holder: Operation | None) -> partition_pb2.Partition:
    """A partition as its worker last reported it; `holder` is the operation under way there."""
    message = partition_pb2.Partition(
        id=each.id,
        kind=partition_pb2.PartitionKind.Value(f"PARTITION_KIND_{each.kind.value.upper()}"),
        gpu=each.gpu_uuid,
        memory_bytes=each.memory_bytes,
        multiprocessors=each.sm_count,
        operation=holder.name if holder is not None else "",
    )
    client = world.processes.workers.get(each.id)
    if client is None:
        why = world.processes.failure(each.id)
        health = "FAILED" if why else "STARTING"
        message.health = partition_pb2.PartitionHealth.Value(f"PARTITION_HEALTH_{health}")
        message.health_reason = why
        return message
    state = client.state
    message.health = partition_pb2.PARTITION_HEALTH_READY
    if each.id in world.closures.taints:
        message.health = partition_pb2.PARTITION_HEALTH_TAINTED
        message.health_reason = world.closures.taints[each.id]
    message.worker_pid = state.pid
    message.worker_generation = state.generation
    message.memory_bytes = state.memory_bytes
    message.memory_free_bytes = state.pages_free * state.page_bytes
    message.page_bytes = state.page_bytes
    message.link_bytes_per_second = state.link_bytes_per_s
    message.device = state.device
    message.models.extend(_residence(world, engine) for engine in state.engines)
    return message


def _residence(world: World, engine: EngineState) -> partition_pb2.Residence:
    return partition_pb2.Residence(
        model=engine.model,
        state=model_state(engine.status.value),
        weights_bytes=engine.weights_bytes,
        kv_used_bytes=engine.kv_used_bytes,
        kv_bytes=engine.kv_bytes,
        running=engine.running,
        waiting=engine.waiting,
        prompt_tokens_total=engine.prompt_tokens_total,
        generation_tokens_total=engine.generation_tokens_total,
        preemptions_total=engine.preemptions_total,
        preemptions_parked_total=engine.preemptions_parked_total,
        reason=engine.reason,
    )


def gpu(world: World, each: Gpu) -> node_pb2.Gpu:
    cordon = world.closures.cordons.get(each.uuid)
    reason = f": {each.health_reason}" if each.health_reason else ""
    instances = [
        node_pb2.GpuInstance(
            id=f"gpu{each.index}/{one.place}",
            profile=one.place.profile,
            start=one.place.start,
            size=one.place.size,
            uuid=one.uuid,
            memory_bytes=one.memory_bytes,
            multiprocessors=one.sm_count,
            number=one.number,
        )
        for one in each.instances or ()
    ]
    return node_pb2.Gpu(
        uuid=each.uuid,
        index=each.index,
        product=each.name,
        pci_bus_id=each.pci_id,
        memory_bytes=each.memory_bytes,
        memory_used_bytes=each.memory_used_bytes,
        multiprocessors=each.sm_count,
        mig_capable=each.mig_capable,
        mig_enabled=each.mig_enabled,
        numa_node=each.numa_node if each.numa_node is not None else -1,
        health=each.health.value + (reason if each.health is not GpuHealth.OK else ""),
        partitions=[part.id for part in world.partitions.values() if part.gpu_uuid == each.uuid],
        instances=instances,
        instances_hidden=each.instances is None,
        link=each.link,
        units=[health.unit(world.health, unit) for unit in world.health.units(each)],
        readings=health.readings(world.health.readings.get(each.uuid)),
        cordoned=cordon is not None,
        cordon_reason=cordon.reason if cordon is not None else "",
    )


def process(info: ProcessInfo) -> node_pb2.Process:
    return node_pb2.Process(
        role=info.role,
        partition=info.partition,
        pid=info.pid,
        generation=info.generation,
        resident_bytes=info.resident_bytes,
        restarts=info.restarts,
        adopted=info.adopted,
    )


def host_store(world: World) -> node_pb2.HostStore:
    """The budget, and each image with the models it belongs to and the workers that map it."""
    store = world.store
    return node_pb2.HostStore(
        budget_bytes=store.budget_bytes,
        used_bytes=store.used_bytes,
        spare_bytes=world.spare.bytes,
        pages=describe(world.config.host_store.huge_pages),
        images=[
            node_pb2.HostImage(
                digest=image.digest,
                models=world.registry.of_digest(image.digest),
                size_bytes=image.size_bytes,
                page_bytes=image.page_bytes,
                pinned=image.pinned,
                attached=[name.removeprefix("worker:") for name in image.holders],
            )
            for image in store.images()
        ],
    )
