"""The multiprocessors of a simulated control daemon that was started with `-S`: who has which.

It owns the rules of the real one: they are given away in chunks, each to one partition; partitions
come and go only while the device has no client; a client without one is refused, whatever else it
asks for, and what is left over of the chunks is nobody's. It knows no socket. The invariant: the
partitions have never more chunks together than there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

INVALID = "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"
SHOWN = 13
"""Characters of a UUID that lists show."""


@dataclass
class Chunks:
    """Of one device: `count` multiprocessors, `size` in each chunk."""

    device: str
    count: int
    size: int
    partitions: dict[str, int] = field(default_factory=dict)
    """Chunks by the name behind the device's."""
    made: int = 0

    @property
    def free(self) -> int:
        """Chunks that nobody has."""
        return self.count // self.size - sum(self.partitions.values())

    def add(self, device: str, chunks: int, clients: bool) -> str:
        """The answer to the command, good or bad."""
        if device != self.device or clients or not 0 < chunks <= self.free:
            return (
                f"Failed to fulfill the requested SM partition of {chunks} chunks, error {INVALID}"
            )
        self.made += 1
        name = f"Dx{self.made}AAAAAAAAAAAAAA"
        self.partitions[name] = chunks
        return f"Partition {device}/{name} created"

    def remove(self, device: str, name: str, clients: bool) -> str:
        """The answer to the command; empty when it is done."""
        if device != self.device or clients or name not in self.partitions:
            return f"Failed to remove partition {name}, error {INVALID}"
        del self.partitions[name]
        return ""

    def granted(self, asked: str | None) -> int:
        """The multiprocessors of the partition that a client names; 0: it is refused."""
        device, _, name = (asked or "").partition("/")
        return self.partitions.get(name, 0) * self.size if device == self.device else 0

    def table(self, used: bool) -> str:
        """What is where, as the program shows it."""
        shown, taken = self.device[:SHOWN], sum(self.partitions.values())
        left = self.count - taken * self.size
        lines = [
            "GPU           Partition           free  used  free  used  clients",
            "                                  chunk chunk SM    SM",
            f"{shown} - {self.free} {taken} {left} {taken * self.size} -",
        ]
        for name, chunks in self.partitions.items():
            who = "Yes" if used else "No"
            lines.append(f"{shown} {name} - {chunks} - {chunks * self.size} {who}")
        return "\n".join(lines)
