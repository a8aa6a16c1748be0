"""Writing answers into a C caller's memory, and the shape of the tables of simulated functions.

It owns the few ways in which NVML's functions hand values back. It knows no function and no node
state. The invariant: nothing is written past what the caller said there is room for.

A signature has one letter per C argument: h device handle, d handle of a device or of a MIG device,
g GPU instance handle, c compute instance handle, m perhaps a device handle (of a function
that is not simulated), e event set handle, i int, u unsigned int, l unsigned long long, p pointer
that must not be null, o pointer that may be null, s string.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pynvml

from partitioner.simulated.node import SimulatedGpu, SimulatedInstance, SimulatedNode

ARGUMENT_TYPES: Mapping[str, Any] = MappingProxyType(
    {
        "h": ctypes.c_void_p,
        "d": ctypes.c_void_p,
        "g": ctypes.c_void_p,
        "c": ctypes.c_void_p,
        "m": ctypes.c_void_p,
        "e": ctypes.c_void_p,
        "i": ctypes.c_int32,
        "u": ctypes.c_uint,
        "l": ctypes.c_ulonglong,
        "p": ctypes.c_void_p,
        "o": ctypes.c_void_p,
        "s": ctypes.c_char_p,
    }
)


class Status(Exception):
    """An NVML error code to return."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


# What a handle stands for: a GPU, or an instance of it (a `d` of an instance is its MIG device).
Held = SimulatedGpu | tuple[SimulatedGpu, SimulatedInstance]

Call = Callable[..., None]
Symbol = tuple[str, Call]


def put_uint(address: int, value: int) -> None:
    ctypes.c_uint.from_address(address).value = value


def put_string(address: int, length: int, text: str) -> None:
    content = text.encode() + b"\0"
    if len(content) > length:
        raise Status(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
    ctypes.memmove(address, content, len(content))


def versioned(struct: Any, address: int, version: int) -> Any:
    """Map a struct that the caller has stamped with its version."""
    value = struct.from_address(address)
    if value.version != version:
        raise Status(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
    return value


def unsigned(read: Callable[[SimulatedGpu], int]) -> Symbol:
    """A call that answers one unsigned number of a device."""

    def call(node: SimulatedNode, gpu: SimulatedGpu, out: int) -> None:
        put_uint(out, read(gpu))

    return "hp", call


def text(read: Callable[[SimulatedGpu], str]) -> Symbol:
    """A call that answers one string of a device."""

    def call(node: SimulatedNode, gpu: SimulatedGpu, out: int, length: int) -> None:
        put_string(out, length, read(gpu))

    return "hpu", call
