"""The descriptors of the process under test."""

from __future__ import annotations

import gc
import os


def open_descriptors() -> set[str]:
    """Those that are open, once what earlier tests left to the collector is closed."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))
