"""Tensors over addresses that the arena owns, on whichever device they are.

It owns the way from an address to a tensor, and of small tensors from the host to a device. It
never allocates, maps or frees device memory. For CUDA the way is DLPack, which is told the device:
torch asks the driver about addresses that come by the CUDA array interface, and refuses those that
have no page yet, as weights have not when an engine is made. Invariant: making a tensor touches no
memory; its user keeps the addresses reserved for as long as it exists.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch

from swap.virtual_memory import view_of

DLPACK_CPU, DLPACK_CUDA = 1, 2
_UNSIGNED, _CAPSULE_NAME = 1, b"dltensor"


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLPack's DLManagedTensor, and after it the shape that it points to."""

    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
    )


def bytes_at(kind: Literal["host", "cuda"], address: int, size_bytes: int) -> torch.Tensor:
    """`size_bytes` bytes from `address` on as uint8, mapped or not."""
    if kind == "host":
        return torch.frombuffer(view_of(address, size_bytes), dtype=torch.uint8)
    return tensor_by_dlpack(address, size_bytes, DLPACK_CUDA)


def tensor_by_dlpack(address: int, size_bytes: int, device_type: int) -> torch.Tensor:
    """Bytes of the first device of a type. What describes them is freed with the tensor."""
    libc, python = ctypes.CDLL(None), ctypes.pythonapi
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    place = libc.malloc(ctypes.sizeof(_Managed))
    if not place:
        raise MemoryError("no memory for the description of a tensor")
    shape = place + _Managed.elements.offset
    tensor = _Tensor(address, device_type, 0, 1, _UNSIGNED, 8, 1, shape, None, 0)
    # What torch calls in the end is libc's own `free`, with the place as its argument: so nothing
    # of Python's has to outlive the tensor.
    deleter = ctypes.cast(libc.free, ctypes.c_void_p)
    managed = _Managed(tensor, None, deleter, size_bytes)
    ctypes.memmove(place, ctypes.byref(managed), ctypes.sizeof(_Managed))
    new_capsule = python.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule: Any = new_capsule(place, _CAPSULE_NAME, None)
    return torch.utils.dlpack.from_dlpack(capsule)


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host's on `device`, in the order of what is computed there.

    The host does not wait for the copy: it comes from pinned memory, which torch keeps until the
    copy has been made.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
