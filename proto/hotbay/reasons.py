"""The one catalogue of reasons: what can go wrong, by name.

Each error of the control API carries a google.rpc.ErrorInfo whose domain is `DOMAIN` and whose
reason is a name of this catalogue; the reason fixes the gRPC status code, and says what the reader
can do. Programs branch on the reason, people read the message beside it.

It owns the names, and never formats a message: figures belong to the one who knows them. A name,
once published, keeps its meaning and its code; new ones are added. Importing it loads neither grpc
nor protobuf.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

DOMAIN = "hotbay"


class Code(IntEnum):
    """The status codes of gRPC, by their numbers in google.rpc.Code."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(StrEnum):
    """A reason, its status code, and what the reader can do about it."""

    code: Code
    advice: str

    def __new__(cls, name: str, code: Code, advice: str) -> Reason:
        member = str.__new__(cls, name)
        member._value_ = name
        member.code = code
        member.advice = advice
        return member

    # fmt: off
    # What was asked for does not exist, or is not a sensible thing to ask.
    MODEL_NOT_FOUND = (
        "MODEL_NOT_FOUND", Code.NOT_FOUND,
        "register it, or see `gpuctl model ls` for the names, versions and labels there are",
    )
    PARTITION_NOT_FOUND = (
        "PARTITION_NOT_FOUND", Code.NOT_FOUND, "see `gpuctl status` for the partitions there are",
    )
    GPU_NOT_FOUND = ("GPU_NOT_FOUND", Code.NOT_FOUND, "see `gpuctl status` for the GPUs there are")
    OPERATION_NOT_FOUND = (
        "OPERATION_NOT_FOUND", Code.NOT_FOUND,
        "see `gpuctl op ls`; finished operations are forgotten after a while",
    )
    IMAGE_UNKNOWN = (
        "IMAGE_UNKNOWN", Code.NOT_FOUND, "the image has left host memory; load the model again",
    )
    INVALID_ARGUMENT = (
        "INVALID_ARGUMENT", Code.INVALID_ARGUMENT, "correct the field that the message names",
    )
    INVALID_REQUEST = (
        "INVALID_REQUEST", Code.INVALID_ARGUMENT, "correct the field that the message names",
    )
    LAYOUT_INVALID = (
        "LAYOUT_INVALID", Code.INVALID_ARGUMENT, "change the line of the layout that it names",
    )
    REQUEST_ID_REUSED = (
        "REQUEST_ID_REUSED", Code.INVALID_ARGUMENT,
        "use a new request_id for a different request; repeat the same request to get its result",
    )
    NOT_IMPLEMENTED = (
        "NOT_IMPLEMENTED", Code.UNIMPLEMENTED, "this version cannot do it; upgrade hotbayd",
    )

    # A hub that models are pulled from.
    HUB_NOT_FOUND = (
        "HUB_NOT_FOUND", Code.NOT_FOUND,
        "check the repository's name and revision; a private one needs a token",
    )
    HUB_REFUSED = (
        "HUB_REFUSED", Code.PERMISSION_DENIED,
        "give a token that may read the repository with --token-file",
    )
    HUB_UNAVAILABLE = (
        "HUB_UNAVAILABLE", Code.UNAVAILABLE,
        "check the network and [models] hub_endpoint, then pull again; it goes on where it ended",
    )
    PULL_FAILED = (
        "PULL_FAILED", Code.INTERNAL, "see the message; pull again, which goes on where it ended",
    )

    # A checkpoint that cannot be used.
    CHECKPOINT_INVALID = (
        "CHECKPOINT_INVALID", Code.FAILED_PRECONDITION,
        "repair the file that the message names, or fetch the checkpoint again",
    )
    ARCH_UNSUPPORTED = (
        "ARCH_UNSUPPORTED", Code.FAILED_PRECONDITION,
        "use a checkpoint of one of the families that the message lists",
    )
    KV_BLOCK_TOO_LARGE = (
        "KV_BLOCK_TOO_LARGE", Code.FAILED_PRECONDITION, "raise the device's page size",
    )
    DEVICE_UNSUITABLE = (
        "DEVICE_UNSUITABLE", Code.FAILED_PRECONDITION,
        "turn off the option that the message names, or use another GPU",
    )
    CORRUPT_WEIGHTS = (
        "CORRUPT_WEIGHTS", Code.DATA_LOSS, "fetch the checkpoint again; check the disk and memory",
    )
    CANARY_FAILED = (
        "CANARY_FAILED", Code.DATA_LOSS,
        "see the message; `gpuctl load MODEL --canary TEXT` records the canary anew",
    )
    CHECKSUM_MISMATCH = (
        "CHECKSUM_MISMATCH", Code.DATA_LOSS,
        "fetch the checkpoint again; check the disk and memory",
    )

    # No room, or no share left.
    INSUFFICIENT_DEVICE_MEMORY = (
        "INSUFFICIENT_DEVICE_MEMORY", Code.RESOURCE_EXHAUSTED,
        "unload or swap out a model of the partition, or use a larger partition",
    )
    INSUFFICIENT_HOST_MEMORY = (
        "INSUFFICIENT_HOST_MEMORY", Code.RESOURCE_EXHAUSTED,
        "unload models with --evict, unpin some, or raise the host store's budget",
    )
    INSUFFICIENT_KV = (
        "INSUFFICIENT_KV", Code.RESOURCE_EXHAUSTED,
        "shorten the model's context, or give it a partition with more memory",
    )
    INSUFFICIENT_DISK = (
        "INSUFFICIENT_DISK", Code.RESOURCE_EXHAUSTED,
        "make room on the disk that the message names, or move [models] directory to a larger one",
    )
    QUOTA_EXCEEDED = (
        "QUOTA_EXCEEDED", Code.RESOURCE_EXHAUSTED, "wait, or raise the tenant's quota",
    )
    QUEUE_FULL = ("QUEUE_FULL", Code.RESOURCE_EXHAUSTED, "retry later with fewer calls at once")
    SLOW_CONSUMER = (
        "SLOW_CONSUMER", Code.RESOURCE_EXHAUSTED,
        "read the stream faster; resume from the token in the metadata",
    )

    # The state of things forbids it, now.
    INVALID_STATE = (
        "INVALID_STATE", Code.FAILED_PRECONDITION,
        "bring the model into the state that the message asks for, then repeat",
    )
    PARTITION_IN_USE = (
        "PARTITION_IN_USE", Code.FAILED_PRECONDITION, "end the processes that hold it",
    )
    MPS_UNAVAILABLE = (
        "MPS_UNAVAILABLE", Code.FAILED_PRECONDITION,
        "install or update nvidia-cuda-mps-control as the message says, or share otherwise",
    )
    IMAGE_IN_USE = (
        "IMAGE_IN_USE", Code.FAILED_PRECONDITION, "unload or unpin the models that use the image",
    )
    GPU_CORDONED = (
        "GPU_CORDONED", Code.FAILED_PRECONDITION, "uncordon the GPU, or name another partition",
    )
    PARTITION_TAINTED = (
        "PARTITION_TAINTED", Code.UNAVAILABLE,
        "see `gpuctl gpu health`; it serves again once it is proven healthy",
    )
    DRIVER_TOO_OLD = (
        "DRIVER_TOO_OLD", Code.FAILED_PRECONDITION, "install a driver of the version named",
    )
    INSTANCES_HIDDEN = (
        "INSTANCES_HIDDEN", Code.FAILED_PRECONDITION,
        "run hotbayd as root, or let it read the driver's MIG capabilities",
    )
    MIG_MODE_DISABLED = (
        "MIG_MODE_DISABLED", Code.FAILED_PRECONDITION, "enable MIG mode on the GPU",
    )
    NOT_CANCELLABLE = (
        "NOT_CANCELLABLE", Code.FAILED_PRECONDITION,
        "the operation has passed the point of no return; wait for it, then undo it",
    )
    MODEL_EXISTS = (
        "MODEL_EXISTS", Code.ALREADY_EXISTS, "use another version, or 0 for the next one",
    )
    OPERATION_IN_PROGRESS = (
        "OPERATION_IN_PROGRESS", Code.ABORTED,
        "wait for the operation that the message names, or cancel it, then repeat",
    )
    ETAG_MISMATCH = (
        "ETAG_MISMATCH", Code.ABORTED, "read the resource again and repeat with what it says now",
    )
    SUPERSEDED = (
        "SUPERSEDED", Code.ABORTED, "a later request took this one's place; look at that one",
    )
    PLAN_STALE = (
        "PLAN_STALE", Code.ABORTED, "the node has changed since; plan again and apply that plan",
    )
    RESET_NEEDED = (
        "RESET_NEEDED", Code.FAILED_PRECONDITION,
        "end what uses the GPU and apply again, or switch MIG mode with nvidia-smi and reboot",
    )
    DRIVER_PERMISSION = (
        "DRIVER_PERMISSION", Code.PERMISSION_DENIED,
        "give hotbayd the right that the message names",
    )
    ROLE_DENIED = ("ROLE_DENIED", Code.PERMISSION_DENIED, "ask for the role that the message names")

    # It was begun, and ended otherwise than meant.
    CANCELLED = ("CANCELLED", Code.CANCELLED, "it was asked to stop; repeat it if that was wrong")
    IMAGE_CACHE_FAILED = (
        "IMAGE_CACHE_FAILED", Code.UNAVAILABLE, "see that the disk of the image cache works and "
        "has space; loads succeed without it",
    )
    BUILD_CANCELLED = (
        "BUILD_CANCELLED", Code.CANCELLED, "the image build was given up; repeat the load",
    )
    TRANSFER_CANCELLED = (
        "TRANSFER_CANCELLED", Code.CANCELLED, "the copy to the device was given up; repeat it",
    )
    ABANDONED = ("ABANDONED", Code.CANCELLED, "the daemon took the step back; see its operation")
    STAGE_TIMED_OUT = (
        "STAGE_TIMED_OUT", Code.DEADLINE_EXCEEDED, "raise the limit of the stage it names",
    )
    TIMED_OUT = (
        "TIMED_OUT", Code.DEADLINE_EXCEEDED, "allow more time, or see what is slow in the events",
    )
    DRAIN_TIMEOUT = (
        "DRAIN_TIMEOUT", Code.DEADLINE_EXCEEDED,
        "raise the drain timeout, or use the recompute or abort policy",
    )
    RESUME_TOKEN_EXPIRED = (
        "RESUME_TOKEN_EXPIRED", Code.OUT_OF_RANGE, "watch again without a token",
    )
    EXCHANGE_FAILED = (
        "EXCHANGE_FAILED", Code.INTERNAL, "the swap was rolled back; see the worker's log",
    )
    TRANSFER_FAILED = (
        "TRANSFER_FAILED", Code.INTERNAL, "repeat it; if it recurs, check the GPU's health",
    )
    LAYOUT_FAILED = (
        "LAYOUT_FAILED", Code.INTERNAL,
        "the layout of before is there again; see the message and the driver's kernel log",
    )
    LAYOUT_UNSETTLED = (
        "LAYOUT_UNSETTLED", Code.INTERNAL,
        "mend what the message names; the layout of before is brought back with the next apply, or "
        "when hotbayd starts",
    )
    WARMUP_FAILED = (
        "WARMUP_FAILED", Code.INTERNAL, "see the worker's log for the request that failed",
    )
    DEVICE_ERROR = ("DEVICE_ERROR", Code.INTERNAL, "check the GPU's health; see the worker's log")
    DEVICE_MISUSE = ("DEVICE_MISUSE", Code.INTERNAL, "report it with the worker's log")
    WORKER_CRASHED = (
        "WORKER_CRASHED", Code.INTERNAL,
        "the worker is started again; repeat the request, and see the worker's log",
    )
    JOURNAL_FAILED = (
        "JOURNAL_FAILED", Code.INTERNAL, "look at the disk that holds the state directory",
    )
    FAIL_POINT = ("FAIL_POINT", Code.INTERNAL, "clear the fail point that asked for it")
    INTERNAL = ("INTERNAL", Code.INTERNAL, "report it with the daemon's log")

    # Not now; the same call may succeed later.
    WORKER_UNAVAILABLE = (
        "WORKER_UNAVAILABLE", Code.UNAVAILABLE, "wait until the partition is ready, then repeat",
    )
    DAEMON_DRAINING = (
        "DAEMON_DRAINING", Code.UNAVAILABLE, "the daemon is stopping; repeat when it is back",
    )
    RECONCILING = (
        "RECONCILING", Code.UNAVAILABLE, "the daemon is finding out what runs; repeat shortly",
    )
    GPU_LOST = ("GPU_LOST", Code.UNAVAILABLE, "the GPU does not answer; see the kernel's log")
    # fmt: on


def known(name: str) -> Reason | None:
    """The catalogue's entry of `name`, or None: a newer daemon may know more reasons."""
    try:
        return Reason(name)  # type: ignore[call-arg]
    except ValueError:
        return None
