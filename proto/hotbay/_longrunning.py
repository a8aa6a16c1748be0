"""The name under which hotbay.v1 imports google.longrunning.

The .proto files import `google/longrunning/operations.proto`, as every other language's tools know
it. The Python package googleapis-common-protos registers the same file as
`google/longrunning/operations_proto.proto`. This module registers, in the default descriptor pool,
a file of the first name whose only content is a public import of the second, so that descriptors
resolve and server reflection can hand out every file that a client asks for.

Generated modules import it first (scripts/proto sees to that). It never defines a message, and it
leaves the name alone where another package has registered it already: the types are then the same.
"""

from __future__ import annotations

from google.longrunning import operations_proto_pb2 as operations_proto_pb2
from google.protobuf import descriptor_pb2, descriptor_pool

CANONICAL_FILE = "google/longrunning/operations.proto"
INSTALLED_FILE = "google/longrunning/operations_proto.proto"


def forwarding_file() -> descriptor_pb2.FileDescriptorProto:
    """The file that stands under the canonical name: one public import, nothing else."""
    return descriptor_pb2.FileDescriptorProto(
        name=CANONICAL_FILE,
        package="google.longrunning",
        dependency=[INSTALLED_FILE],
        public_dependency=[0],
        syntax="proto3",
    )


def register(pool: descriptor_pool.DescriptorPool) -> None:
    """Make `CANONICAL_FILE` known to `pool`, unless it is known already."""
    try:
        pool.FindFileByName(CANONICAL_FILE)
    except KeyError:
        pool.AddSerializedFile(forwarding_file().SerializeToString())


# Work at import, as in every generated module: the descriptors that follow need the name.
register(descriptor_pool.Default())
