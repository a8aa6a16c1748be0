"""The simulated library: C entry points over a simulated node.

It owns the border between C and Python: looking symbols up, taking C arguments, returning codes,
init and shutdown counting. It never decides what a call answers (that is `calls`) and never lets an
exception cross into C. The invariant: to a caller it looks like a loaded libnvidia-ml: symbols take
C arguments without declared types, what the driver exports but this board does not offer answers
NOT_SUPPORTED, what no driver exports is not there at all.
"""

from __future__ import annotations

import ctypes
import logging
import re
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pynvml

from partitioner.simulated.abi import ARGUMENT_TYPES, Held, Status, Symbol
from partitioner.simulated.calls import CALLS, WITHOUT_INIT
from partitioner.simulated.health_calls import HEALTH_CALLS
from partitioner.simulated.mig_calls import MIG_CALLS
from partitioner.simulated.mig_changes import MIG_CHANGES
from partitioner.simulated.node import SimulatedGpu, SimulatedNode
from partitioner.simulated.reading_calls import READING_CALLS

_LOGGER = logging.getLogger(__name__)
_EXPORTED = re.compile(
    r"nvml(System|Device|Unit|Event|Gpu|Vgpu|Compute|Gpm|Get|Set|Init|Shutdown|ErrorString)\w*"
)
# Texts of codes that pynvml leaves to the library.
_ERROR_TEXTS = {
    0: "Success",
    19: "In use by another client",
    23: "Insufficient Resources",
    25: "Version mismatch between the argument and the library",
    28: "GPU not found",
}
TABLES: Mapping[str, Symbol] = MappingProxyType(
    {**CALLS, **MIG_CALLS, **MIG_CHANGES, **READING_CALLS, **HEALTH_CALLS}
)
"""Every symbol that is simulated."""


class SimulatedLibrary:
    """Stands where a `ctypes.CDLL` of libnvidia-ml.so.1 would: `library.nvmlInit_v2()` works."""

    def __init__(self, node: SimulatedNode) -> None:
        self.node = node
        self._by_handle = {gpu.handle: gpu for gpu in node.gpus}
        self._lock = threading.Lock()
        self._inits = 0
        self._functions: dict[str, Any] = {}
        self._strings: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Look a symbol up; AttributeError, as from a CDLL, is what "not exported" looks like."""
        if not _EXPORTED.fullmatch(name) or name in self.node.hidden_symbols:
            raise AttributeError(f"the simulated library exports no symbol {name}")
        with self._lock:
            if name not in self._functions:
                self._functions[name] = self._entry_point(name)
            return self._functions[name]

    def _entry_point(self, name: str) -> Any:
        """Make the C function of a symbol. Its thunk lives as long as the function is held."""
        if name == "nvmlErrorString":
            return _as_c_function(ctypes.c_void_p, (ctypes.c_int,), self._error_string)
        if name in ("nvmlInit_v2", "nvmlInitWithFlags", "nvmlShutdown"):
            count = self._shutdown if name == "nvmlShutdown" else self._init
            return _as_c_function(ctypes.c_int, (), lambda: self._answer(name, None, count))
        unsupported = ("m" if name.startswith("nvmlDevice") else "", None)
        signature, call = TABLES.get(name) or unsupported

        def body(*arguments: Any) -> int:
            return self._call(name, signature, call, arguments)

        return _as_c_function(ctypes.c_int, tuple(ARGUMENT_TYPES[kind] for kind in signature), body)

    def _call(
        self,
        name: str,
        signature: str,
        call: Callable[..., None] | None,
        arguments: tuple[Any, ...],
    ) -> int:
        if self._inits == 0 and name not in WITHOUT_INIT:
            return int(pynvml.NVML_ERROR_UNINITIALIZED)
        resolved: list[Any] = []
        gpu: SimulatedGpu | None = None
        for kind, argument in zip(signature, arguments, strict=True):
            if kind in "hm":
                argument = gpu = self._by_handle.get(argument)
            elif kind in "dgc":
                argument = self._held(kind, argument)
                gpu = argument[0] if isinstance(argument, tuple) else argument
            if argument is None and kind not in "mo":
                return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
            resolved.append(argument)

        def act() -> None:
            if gpu is not None and gpu.lost:
                raise Status(pynvml.NVML_ERROR_GPU_IS_LOST)
            if call is None:
                raise Status(pynvml.NVML_ERROR_NOT_SUPPORTED)
            call(self.node, *resolved)

        return self._answer(name, gpu, act)

    def _held(self, kind: str, handle: int | None) -> Held | None:
        """What a handle of a GPU or MIG device (d), a GPU (g) or compute instance (c) stands for.

        Looked up among the instances that exist now: a handle of one that is gone is stale.
        """
        if handle is None:
            return None
        if kind == "d" and handle in self._by_handle:
            return self._by_handle[handle]
        for gpu in self.node.gpus:
            for each in gpu.instances:
                if kind == "g" and each.handle == handle:
                    return gpu, each
                if each.complete and handle == (
                    each.device_handle if kind == "d" else each.compute_handle
                ):
                    return gpu, each
        return None

    def _answer(self, name: str, gpu: SimulatedGpu | None, act: Callable[[], None]) -> int:
        """Let injected trouble pass, act, and turn the outcome into a code."""
        try:
            code = self.node.before_call(name, gpu)
            if code is None:
                act()
                code = pynvml.NVML_SUCCESS
        except Status as status:
            code = status.code
        except Exception:  # Nothing may unwind through C: the caller gets a code, the log the rest.
            _LOGGER.exception("the simulated %s failed", name)
            code = pynvml.NVML_ERROR_UNKNOWN
        return int(code)

    def _init(self) -> None:
        with self._lock:
            self._inits += 1
            self.node.opened = self._inits

    def _shutdown(self) -> None:
        with self._lock:
            if self._inits == 0:
                raise Status(pynvml.NVML_ERROR_UNINITIALIZED)
            self._inits -= 1
            self.node.opened = self._inits

    def _error_string(self, code: int) -> int:
        """Return the address of a string that lives as long as the library, as NVML's do."""
        with self._lock:
            if code not in self._strings:
                named = pynvml.NVMLError._errcode_to_string
                text = named.get(code) or _ERROR_TEXTS.get(code) or "Unknown Error"
                self._strings[code] = ctypes.create_string_buffer(text.encode())
            return ctypes.addressof(self._strings[code])


def _as_c_function(result: Any, arguments: tuple[Any, ...], body: Callable[..., Any]) -> Any:
    """Wrap a Python callable as a C function that is called without declared argument types.

    That is how ctypes calls the functions of a loaded library, so pynvml passes here exactly what
    it would pass to the driver.
    """
    thunk = ctypes.CFUNCTYPE(result, *arguments)(body)
    address = ctypes.cast(thunk, ctypes.c_void_p).value
    assert address is not None, "a thunk has an address"
    function = ctypes.CFUNCTYPE(result)(address)
    function.thunk = thunk  # type: ignore[attr-defined]  # Keeps the code behind the address alive.
    return function
