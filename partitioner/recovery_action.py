"""What an NVIDIA driver says a GPU needs, as NVML numbers it.

Only the words. The invariant: a number that a newer driver adds is no error, and is taken for the
strongest that a node can do by itself.
"""

from __future__ import annotations

from enum import IntEnum


class RecoveryAction(IntEnum):
    """NVML's field 230, and what XID 154 says has changed."""

    NONE = 0
    GPU_RESET = 1
    NODE_REBOOT = 2
    DRAIN_P2P = 3
    DRAIN_AND_RESET = 4
    RECOVER_IMEX = 5
    BUS_RESET = 6
    SYSTEM_REBOOT = 7

    @classmethod
    def of(cls, number: int) -> RecoveryAction:
        """The action of a number."""
        try:
            return cls(number)
        except ValueError:
            return cls.NODE_REBOOT
