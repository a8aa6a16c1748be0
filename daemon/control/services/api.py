"""The whole API, put together: which object answers which service, and what the watch shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from google.longrunning import operations_proto_pb2 as longrunning
from google.protobuf.message import Message
from hotbay.v1 import (
    doctor_pb2,
    model_pb2,
    node_pb2,
    partition_pb2,
    placement_pb2,
    scheduling_pb2,
    simulation_pb2,
    tenant_pb2,
    watch_pb2,
)

from daemon.control.actions.conductor import Conductor
from daemon.control.actions.images import Images
from daemon.control.actions.layout_changes import LayoutChanges
from daemon.control.actions.layouts import Layouts
from daemon.control.actions.placing import Placing
from daemon.control.actions.pulls import Pulls
from daemon.control.actions.routing import Router
from daemon.control.services import answers, views
from daemon.control.services.doctor import DoctorService
from daemon.control.services.models import ModelService
from daemon.control.services.nodes import NodeService, PartitionService
from daemon.control.services.operations import OperationsService, WatchService
from daemon.control.services.placing import PlacementService
from daemon.control.services.server import Server
from daemon.control.services.simulation import SimulationService
from daemon.control.services.watch import Hub
from daemon.control.state.operations import Operations
from daemon.control.state.world import World

# Older ones are listed by the Operations service; a watcher wants to know what goes on.
OPERATIONS_SHOWN_MAX = 100


def make_server(
    world: World,
    operations: Operations,
    conductor: Conductor,
    router: Router,
    hub: Hub,
    node_service: NodeService,
    images: Images,
    layouts: Layouts,
    layout_changes: LayoutChanges,
    pulls: Pulls,
    doctor: DoctorService,
    simulation: SimulationService | None,
) -> Server:
    """The server with every service of the API; None stands for one that is not there yet."""
    implementations: dict[str, object | None] = {
        "NodeService": node_service,
        "PartitionService": PartitionService(world, operations, layouts, layout_changes),
        "PlacementService": PlacementService(Placing(world, layouts)),
        "ModelService": ModelService(world, operations, conductor, router, images, pulls),
        "DoctorService": doctor,
        "WatchService": WatchService(hub),
        "Operations": OperationsService(operations),
        "SimulationService": simulation,
    }
    files = (
        node_pb2.DESCRIPTOR,
        partition_pb2.DESCRIPTOR,
        placement_pb2.DESCRIPTOR,
        model_pb2.DESCRIPTOR,
        doctor_pb2.DESCRIPTOR,
        watch_pb2.DESCRIPTOR,
        scheduling_pb2.DESCRIPTOR,
        tenant_pb2.DESCRIPTOR,
        longrunning.DESCRIPTOR,
        *([simulation_pb2.DESCRIPTOR] if simulation is not None else []),
    )
    services = {
        service: implementations.get(service.name)
        for file in files
        for service in file.services_by_name.values()
    }
    config = world.config
    return Server(config.control_socket, services, config.limits.request_bytes_max)


def snapshot(
    world: World, operations: Operations, kinds: Iterable[str]
) -> Mapping[str, Mapping[str, Message]]:
    """The resources of these kinds as they are now, by kind and name."""
    looks: dict[str, Callable[[], Mapping[str, Message]]] = {
        "gpu": lambda: {gpu.uuid: views.gpu(world, gpu) for gpu in world.gpus if gpu.uuid},
        "process": lambda: {
            " ".join(filter(None, (info.role, info.partition))): views.process(info)
            for info in world.processes.processes()
        },
        "partition": lambda: {
            key: views.partition(world, each, operations.holder(f"partition:{key}"))
            for key, each in world.partitions.items()
        },
        "model": lambda: {name: views.model(world, name) for name in world.registry.names()},
        "operation": lambda: {
            record.name: answers.operation(record)
            for record in operations.all()[:OPERATIONS_SHOWN_MAX]
        },
    }
    return {kind: looks[kind]() for kind in kinds}
