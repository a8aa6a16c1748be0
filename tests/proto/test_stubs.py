"""The generated stubs: fresh, lint-free, importable alone, and whole in reflection."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hotbay.v1 import (
    model_pb2,
    node_pb2,
    partition_pb2,
    placement_pb2,
    scheduling_pb2,
    tenant_pb2,
    watch_pb2,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "proto"
SERVICES = (
    "hotbay.v1.ModelService",
    "hotbay.v1.NodeService",
    "hotbay.v1.PartitionService",
    "hotbay.v1.PlacementService",
    "hotbay.v1.SchedulingService",
    "hotbay.v1.TenantService",
    "hotbay.v1.WatchService",
    "google.longrunning.Operations",
)
FILES = (model_pb2, node_pb2, partition_pb2, placement_pb2, scheduling_pb2, tenant_pb2, watch_pb2)


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def copied_script(tmp_path: Path) -> Path:
    """The script in a tree of its own, so that a test may spoil its input."""
    shutil.copytree(
        ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "scripts").mkdir()
    return Path(shutil.copy(SCRIPT, tmp_path / "scripts" / "proto"))


def test_what_is_committed_is_as_generated() -> None:
    done = run_script(SCRIPT, "--check")
    assert done.returncode == 0, done.stderr


def test_buf_finds_nothing_to_say() -> None:
    done = run_script(SCRIPT, "--lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_proto_is_noticed_named_and_mended(copied_script: Path) -> None:
    directory = copied_script.parent.parent / "proto" / "hotbay" / "v1"
    node = directory / "node.proto"
    node.write_text(node.read_text().replace("string hostname = 1;", "string host_name = 1;"))
    (directory / "gone_pb2.py").write_text("# left behind by a file that is no more\n")
    stale = run_script(copied_script, "--check")
    assert stale.returncode == 1
    assert "node_pb2.py" in stale.stderr
    assert "gone_pb2.py" in stale.stderr
    assert "model_pb2.py" not in stale.stderr
    assert run_script(copied_script).returncode == 0
    assert run_script(copied_script, "--check").returncode == 0
    assert "host_name" in (directory / "node_pb2.pyi").read_text()
    assert not (directory / "gone_pb2.py").exists()


def test_lint_refuses_a_name_against_the_rules(copied_script: Path) -> None:
    node = copied_script.parent.parent / "proto" / "hotbay" / "v1" / "node.proto"
    node.write_text(node.read_text().replace("string hostname = 1;", "string hostName = 1;"))
    done = run_script(copied_script, "--lint")
    assert done.returncode == 1
    assert "lower_snake_case" in done.stdout + done.stderr


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "proto"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_messages_load_without_grpc() -> None:
    done = run_python(
        "import sys\n"
        "from hotbay.v1 import common_pb2, model_pb2, node_pb2, partition_pb2\n"
        "from hotbay.v1 import scheduling_pb2, tenant_pb2, watch_pb2\n"
        "print('grpc' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


def test_reasons_and_errors_load_without_protobuf() -> None:
    done = run_python(
        "import sys\n"
        "import hotbay, hotbay.reasons, hotbay.errors, hotbay.endpoints\n"
        "print('grpc' in sys.modules, 'google.protobuf' in sys.modules)"
    )
    assert done.stdout == "False False\n", done.stderr


def test_every_implementation_of_protobuf_takes_the_stubs() -> None:
    done = run_python(
        "from google.protobuf.internal import api_implementation as chosen\n"
        "from hotbay.v1 import watch_pb2, watch_pb2_grpc, model_pb2_grpc\n"
        "event = watch_pb2.WatchEvent()\n"
        "event.operation.name = 'operations/1'\n"
        "print(chosen.Type(), event.WhichOneof('resource'))",
        PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python",
    )
    assert done.stdout == "python operation\n", done.stderr


@pytest.fixture
def reflected() -> Iterator[descriptor_pool.DescriptorPool]:
    """A pool filled only over the wire, as grpcurl's is."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    reflection.enable_server_reflection((*SERVICES, reflection.SERVICE_NAME), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    server.stop(None).wait()


def test_reflection_shows_every_service_method_and_message(
    reflected: descriptor_pool.DescriptorPool,
) -> None:
    for file in FILES:
        for service in file.DESCRIPTOR.services_by_name.values():
            seen = reflected.FindServiceByName(service.full_name)
            assert {method.name for method in seen.methods} == {
                method.name for method in service.methods
            }
            for method in seen.methods:
                assert method.input_type.file.package == "hotbay.v1"
                assert method.output_type.full_name
        for message in file.DESCRIPTOR.message_types_by_name.values():
            seen_message = reflected.FindMessageTypeByName(message.full_name)
            assert [one.name for one in seen_message.fields] == [one.name for one in message.fields]


def test_operations_are_known_by_their_canonical_file(
    reflected: descriptor_pool.DescriptorPool,
) -> None:
    file = reflected.FindFileByName("google/longrunning/operations.proto")
    assert "Operation" in file.message_types_by_name
    swap = reflected.FindServiceByName("hotbay.v1.ModelService").methods_by_name["SwapModel"]
    assert swap.output_type is file.message_types_by_name["Operation"]


def test_every_change_can_be_repeated_and_tried() -> None:
    reads = ("Get", "List", "Plan", "Explain", "Watch")
    changes = [
        method.input_type
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if not method.name.startswith(reads)
    ]
    assert len(changes) > 15
    for request in changes:
        assert {"request_id", "validate_only"} <= set(request.fields_by_name), request.full_name
