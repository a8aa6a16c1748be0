"""The machine code of this folder: whether it is there, what this processor runs of it, its calls.

Owns loading it and the types of its functions; it never decides when they are used. It is compiled
when Hotbay is installed (`setup.py`), once for each level of x86-64 whose vectors are of use. Where
it was not, or on another processor, there is none and torch computes. It brings no threads: the
functions of OpenMP are found in the runtime that torch has loaded. Invariant: no function is called
of a library that was compiled from other sources than those that lie here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sysconfig
from pathlib import Path

import torch

from engine.kernels.native.sources import fingerprint

log = logging.getLogger(__name__)

LEVELS = {"AVX512": "x86_64_v4", "AVX2": "x86_64_v3"}
"""The library for each capability that torch finds in a processor; the best first, each of which
runs where a better one would."""

MEND = "install Hotbay again where there is GCC 11 or newer"
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
FUNCTIONS = {
    "linear_float": "pn pppp nnn",
    "linear_half": "pn pppp nnn",
    "add_rms_norm": "i pppp nnf",
    "gated_activation": "i pp nn",
    "rotate_and_store": "i pppf ppp pnn p nnnn",
    "attend": "i ppn ppp nnn p nnnn",
    "use_matrix_unit": "",
    "has_wide_vectors": "",
    "sources": "",
}
"""Types of each function's arguments; what they mean is said where it is written."""


def levels_here() -> tuple[str, ...]:
    """The levels that this processor runs, the best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    levels = tuple(LEVELS.values())
    return levels[levels.index(LEVELS[capability]) :] if capability in LEVELS else ()


@functools.cache
def best_library() -> ctypes.CDLL | None:
    """The best machine code for this processor; None where there is none."""
    levels = levels_here()
    found = next((found for level in levels if (found := load(level)) is not None), None)
    if levels and found is None:
        log.warning(
            "Hotbay has no operations for this processor (%s), and torch computes in their place, "
            "which is slower: %s",
            ", ".join(levels),
            MEND,
        )
    return found


@functools.cache
def load(level: str) -> ctypes.CDLL | None:
    """The machine code of one level that this processor runs; None where it was not compiled."""
    path = Path(__file__).parent / f"{level}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
        for function, types in FUNCTIONS.items():
            arguments = [TYPES[one] for one in types.replace(" ", "")]
            getattr(loaded, f"hotbay_{function}").argtypes = arguments
    except (OSError, AttributeError) as error:
        log.warning("%s cannot be used (%s): %s", path, error, MEND)
        return None
    loaded.hotbay_sources.restype = ctypes.c_uint64
    wanted = fingerprint(path.parent)
    if wanted and loaded.hotbay_sources() != wanted:
        log.warning("%s was compiled from other sources than those beside it: %s", path, MEND)
        return None
    return loaded


@functools.cache
def has_matrix_unit(loaded: ctypes.CDLL) -> bool:
    """Whether it computes products in bfloat16 here. The kernel lends the unit to a process that
    asks, and is asked once: what is said first holds for all engines of a worker."""
    return bool(loaded.hotbay_use_matrix_unit())


def describe() -> str:
    """What computes on this processor, in words that change when results may."""
    loaded = best_library()
    if loaded is None:
        return "torch"
    unit = " with the matrix unit" if has_matrix_unit(loaded) else ""
    return f"library {loaded.hotbay_sources():016x}{unit}"
