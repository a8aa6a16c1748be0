"""The calls to the CUDA driver that device memory is made of, and no others.

It owns their Protocol, the errors they raise, and the real driver behind it, by way of
`cuda.bindings.driver`, which is loaded when a driver is opened and not before. It keeps no state
and no rule: `CudaDevice` orders the calls, and `FakeDriver` enforces what the driver does. Handles,
addresses, streams and events are plain integers here, as they are for the driver; so nothing hangs
on the classes of one release of the bindings. Each call lets other threads run meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from swap.errors import DeviceError

DEFAULT_STREAM = 1
"""The legacy default stream (CU_STREAM_LEGACY), on which torch computes unless told otherwise."""

INVALID_VALUE = "CUDA_ERROR_INVALID_VALUE"
OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
INVALID_CONTEXT = "CUDA_ERROR_INVALID_CONTEXT"
NOT_INITIALIZED = "CUDA_ERROR_NOT_INITIALIZED"
INVALID_DEVICE = "CUDA_ERROR_INVALID_DEVICE"
INVALID_HANDLE = "CUDA_ERROR_INVALID_HANDLE"
NOT_READY = "CUDA_ERROR_NOT_READY"
NOT_SUPPORTED = "CUDA_ERROR_NOT_SUPPORTED"
ALREADY_REGISTERED = "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
NOT_REGISTERED = "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"


class DriverError(DeviceError):
    """The driver refused `call` with `code`, the name of its CUresult."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call} failed with {code}", call=call, code=code)
        self.call = call
        self.code = code


@dataclass(frozen=True)
class Rows:
    """Equal rows that are `pitch_bytes` apart on the device and side by side on the host."""

    device: int
    pitch_bytes: int
    host: int
    row_bytes: int
    rows: int


class Driver(Protocol):
    """The driver's calls, by their names without `cu`. All but `init` may raise DriverError.

    All from `mem_address_reserve` on need a current context in the calling thread.
    """

    def init(self) -> None:
        """Load and initialise the driver. Raises DeviceError where there is none."""

    def device_get(self, ordinal: int) -> int: ...

    def primary_context_retain(self, device: int) -> int: ...

    def primary_context_release(self, device: int) -> None: ...

    def context_set_current(self, context: int) -> None: ...

    def granularity(self, device: int) -> int:
        """Bytes that sizes of physical handles, and what is mapped, must be multiples of."""

    def multiprocessors(self, device: int) -> int:
        """How many of them this process may compute on."""

    def pitch_bytes_max(self, device: int) -> int:
        """How far apart the rows of one copy may lie."""

    def mem_address_reserve(self, size_bytes: int, alignment_bytes: int) -> int: ...

    def mem_address_free(self, address: int, size_bytes: int) -> None: ...

    def mem_create(self, size_bytes: int, device: int) -> int: ...

    def mem_release(self, handle: int) -> None: ...

    def mem_map(self, address: int, size_bytes: int, handle: int) -> None:
        """Map a handle whole."""

    def mem_set_access(self, address: int, size_bytes: int, device: int) -> None:
        """Let `device` read and write mapped addresses."""

    def mem_unmap(self, address: int, size_bytes: int) -> None:
        """Unmap one whole handle, or several that lie side by side: its documentation says no more
        than that a range must be the one that was mapped, which a driver may take to mean one."""

    def host_register(self, address: int, size_bytes: int, *, read_only: bool) -> None: ...

    def host_unregister(self, address: int) -> None: ...

    def memcpy_to_device(self, destination: int, source: int, size: int, stream: int) -> None:
        """Issue a copy; it runs in the stream's order."""

    def memcpy_to_host(self, destination: int, source: int, size: int, stream: int) -> None: ...

    def memcpy_rows(self, shape: Rows, stream: int, *, to_host: bool) -> None:
        """Issue a copy of rows, in one direction or the other."""

    def stream_create(self) -> int:
        """A stream that does not wait for the default stream, nor that for it."""

    def stream_synchronize(self, stream: int) -> None: ...

    def stream_wait_event(self, stream: int, event: int) -> None:
        """Have what is issued from now on wait for what the event was last recorded behind."""

    def stream_destroy(self, stream: int) -> None: ...

    def event_create(self) -> int: ...

    def event_record(self, event: int, stream: int) -> None: ...

    def event_done(self, event: int) -> bool:
        """Whether what was issued before the event was last recorded is complete."""

    def event_synchronize(self, event: int) -> None:
        """Wait for an event; the thread sleeps meanwhile."""

    def event_destroy(self, event: int) -> None: ...


class CudaDriver:
    """The driver of this machine's GPUs; see `Driver`."""

    def __init__(self) -> None:
        self._cu: Any = None

    def init(self) -> None:
        """Load the bindings and the driver's library. Raises DeviceError with what to install."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise DeviceError(
                f"the CUDA bindings cannot be loaded ({error}): install cuda-bindings"
            ) from error
        self._cu = driver
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # the bindings' own, where libcuda is not to be found
            raise DeviceError(
                f"the CUDA driver cannot be loaded ({error}): install the NVIDIA driver, or use "
                "the host device"
            ) from error

    def device_get(self, ordinal: int) -> int:
        return int(self._call("cuDeviceGet", ordinal))

    def primary_context_retain(self, device: int) -> int:
        return int(self._call("cuDevicePrimaryCtxRetain", device))

    def primary_context_release(self, device: int) -> None:
        self._call("cuDevicePrimaryCtxRelease", device)

    def context_set_current(self, context: int) -> None:
        self._call("cuCtxSetCurrent", context)

    def granularity(self, device: int) -> int:
        kinds = self._cu.CUmemAllocationGranularity_flags
        minimum = kinds.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        properties = self._properties(device)
        return int(self._call("cuMemGetAllocationGranularity", properties, minimum))

    def multiprocessors(self, device: int) -> int:
        attribute = self._cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        return int(self._call("cuDeviceGetAttribute", attribute, device))

    def pitch_bytes_max(self, device: int) -> int:
        attribute = self._cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_PITCH
        return int(self._call("cuDeviceGetAttribute", attribute, device))

    def mem_address_reserve(self, size_bytes: int, alignment_bytes: int) -> int:
        return int(self._call("cuMemAddressReserve", size_bytes, alignment_bytes, 0, 0))

    def mem_address_free(self, address: int, size_bytes: int) -> None:
        self._call("cuMemAddressFree", address, size_bytes)

    def mem_create(self, size_bytes: int, device: int) -> int:
        return int(self._call("cuMemCreate", size_bytes, self._properties(device), 0))

    def mem_release(self, handle: int) -> None:
        self._call("cuMemRelease", handle)

    def mem_map(self, address: int, size_bytes: int, handle: int) -> None:
        self._call("cuMemMap", address, size_bytes, 0, handle, 0)

    def mem_set_access(self, address: int, size_bytes: int, device: int) -> None:
        access = self._cu.CUmemAccessDesc()
        access.location.type = self._cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = device
        access.flags = self._cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, size_bytes, [access], 1)

    def mem_unmap(self, address: int, size_bytes: int) -> None:
        self._call("cuMemUnmap", address, size_bytes)

    def host_register(self, address: int, size_bytes: int, *, read_only: bool) -> None:
        flags = self._cu.CU_MEMHOSTREGISTER_READ_ONLY if read_only else 0
        self._call("cuMemHostRegister", address, size_bytes, flags)

    def host_unregister(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)

    def memcpy_to_device(self, destination: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyHtoDAsync", destination, source, size, stream)

    def memcpy_to_host(self, destination: int, source: int, size: int, stream: int) -> None:
        self._call("cuMemcpyDtoHAsync", destination, source, size, stream)

    def memcpy_rows(self, shape: Rows, stream: int, *, to_host: bool) -> None:
        copy, kinds = self._cu.CUDA_MEMCPY2D(), self._cu.CUmemorytype
        copy.WidthInBytes, copy.Height = shape.row_bytes, shape.rows
        if to_host:
            copy.srcMemoryType = kinds.CU_MEMORYTYPE_DEVICE
            copy.srcDevice, copy.srcPitch = shape.device, shape.pitch_bytes
            copy.dstMemoryType = kinds.CU_MEMORYTYPE_HOST
            copy.dstHost, copy.dstPitch = shape.host, shape.row_bytes
        else:
            copy.srcMemoryType = kinds.CU_MEMORYTYPE_HOST
            copy.srcHost, copy.srcPitch = shape.host, shape.row_bytes
            copy.dstMemoryType = kinds.CU_MEMORYTYPE_DEVICE
            copy.dstDevice, copy.dstPitch = shape.device, shape.pitch_bytes
        self._call("cuMemcpy2DAsync", copy, stream)

    def stream_create(self) -> int:
        flags = self._cu.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreate", int(flags)))

    def stream_synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        self._call("cuStreamWaitEvent", stream, event, 0)

    def stream_destroy(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def event_create(self) -> int:
        kinds = self._cu.CUevent_flags
        # Who waits for a copy sleeps, and leaves the core to what computes meanwhile.
        flags = int(kinds.CU_EVENT_DISABLE_TIMING) | int(kinds.CU_EVENT_BLOCKING_SYNC)
        return int(self._call("cuEventCreate", flags))

    def event_record(self, event: int, stream: int) -> None:
        self._call("cuEventRecord", event, stream)

    def event_done(self, event: int) -> bool:
        try:
            self._call("cuEventQuery", event)
        except DriverError as error:
            if error.code != NOT_READY:
                raise
            return False
        return True

    def event_synchronize(self, event: int) -> None:
        self._call("cuEventSynchronize", event)

    def event_destroy(self, event: int) -> None:
        self._call("cuEventDestroy", event)

    def _properties(self, device: int) -> Any:
        """Memory of `device`, not shared with other processes."""
        properties = self._cu.CUmemAllocationProp()
        properties.type = self._cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = self._cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = device
        return properties

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the driver; returns what it gives, if anything."""
        if self._cu is None:
            raise DriverError(name, NOT_INITIALIZED)
        status, *values = getattr(self._cu, name)(*arguments)
        if int(status) != 0:
            # A driver newer than the bindings may return codes that these have no name for.
            raise DriverError(name, getattr(status, "name", f"CUresult {int(status)}"))
        return values[0] if values else None
