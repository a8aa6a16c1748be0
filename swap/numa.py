"""On which NUMA node new memory should be, for the threads of this process.

It owns one system call, which neither Python nor libc has a function for. A preference, never a
demand: memory that the node has not got is taken elsewhere, and a host of one node is left alone.
"""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

NODES = Path("/sys/devices/system/node")
NODE_MAX = 1023

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_PREFERRED = 1


def nodes(directory: Path = NODES) -> tuple[int, ...]:
    """The NUMA nodes of the host, in order; one where the system does not say."""
    names = (path.name for path in directory.glob("node*")) if directory.is_dir() else ()
    found = sorted(int(name[4:]) for name in names if re.fullmatch(r"node\d+", name))
    return tuple(found) or (0,)


def prefer_node(node: int, directory: Path = NODES) -> bool:
    """Have memory that this thread, and those it starts, touch first come from `node`.

    Returns whether that was asked of the system: not for -1, an unknown node, or an only one.
    """
    known = nodes(directory)
    number = _SET_MEMPOLICY.get(platform.machine())
    if len(known) < 2 or node not in known or node > NODE_MAX or number is None:
        return False
    words = (ctypes.c_ulong * ((NODE_MAX + 1) // 64))()
    words[node // 64] = 1 << (node % 64)
    call = ctypes.CDLL(None).syscall
    done: int = call(ctypes.c_long(number), _MPOL_PREFERRED, words, ctypes.c_ulong(NODE_MAX + 1))
    return done == 0
