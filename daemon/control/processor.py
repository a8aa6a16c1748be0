"""What the host's processor can compute with, as far as it decides what images are made of.

Owns the reading of the kernel's list of instructions. It never decides what is done with the
answer. Invariant: a processor that is not known to have an instruction has not.
"""

from __future__ import annotations

from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Products of bfloat16, as x86 (the first two) and Arm call them."""


def computes_bfloat16(cpu_info: Path = CPU_INFO) -> bool:
    """Whether products of bfloat16 are instructions; without them they take longer than those of
    float32 do."""
    try:
        lines = cpu_info.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return False
    names = (line.partition(":")[2].split() for line in lines if _lists_instructions(line))
    return not BFLOAT16_INSTRUCTIONS.isdisjoint(next(names, []))


def _lists_instructions(line: str) -> bool:
    return line.partition(":")[0].strip() in ("flags", "Features")
