"""Putting a simulated library where pynvml keeps the real one, and taking it away again.

It owns the few module variables of pynvml that stand for the loaded library. It never edits pynvml
itself. The invariant: on leaving, pynvml is exactly as it was found, also after an error, and a
library that is in use is never replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pynvml

from partitioner.errors import SimulationError
from partitioner.simulated.node import SimulatedNode
from partitioner.simulated.nvml_library import SimulatedLibrary


@contextmanager
def installed(node: SimulatedNode) -> Iterator[SimulatedNode]:
    """Let pynvml, in this whole process, talk to `node` until the context is left.

    Raises `SimulationError` when NVML is initialised already: handles of two libraries would mix.
    """
    with pynvml.libLoadLock:
        if pynvml._nvmlLib_refcount > 0:
            raise SimulationError(
                "NVML is initialised in this process already; install the simulated node before "
                "the first use of NVML, or close its readers first"
            )
        library_before = pynvml.nvmlLib
        pointers_before = dict(pynvml._nvmlGetFunctionPointer_cache)
        texts_before = dict(pynvml.NVMLError._errcode_to_string)
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml.nvmlLib = SimulatedLibrary(node)
    try:
        yield node
    finally:
        with pynvml.libLoadLock:
            pynvml.nvmlLib = library_before
            pynvml._nvmlLib_refcount = 0
            pynvml._nvmlGetFunctionPointer_cache.clear()
            pynvml._nvmlGetFunctionPointer_cache.update(pointers_before)
            pynvml.NVMLError._errcode_to_string = texts_before
