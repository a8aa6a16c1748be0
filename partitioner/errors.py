"""Every error that this package raises, in one tree.

It owns the names callers catch; it never decides what to do about a failure. Each message says what
failed, on what, and what the reader can do.

    PartitionerError
    ├── DocumentError            a YAML document is refused; carries its source and line
    ├── UnknownBoardError        no board of that name in the catalogue
    ├── LayoutDoesNotFitError    no placement of what is wanted; carries the file's line
    ├── SimulationError          a --simulate value, or the installing of the simulated library
    └── NvmlError
        ├── NvmlUnavailableError no usable NVML library or driver on this host
        ├── NvmlCallError        a call of the library failed; carries function and code
        ├── NvmlTimeoutError     a call did not return within its deadline
        ├── NvmlBusyError        too many calls wait already
        ├── NvmlClosedError      the reader was closed
        ├── GpuLostError         the GPU asked about is lost or unknown
        └── StaleGenerationError the caller's knowledge is older than the last change of geometry
"""

from __future__ import annotations


class PartitionerError(Exception):
    """Base of everything this package raises on purpose."""


class DocumentError(PartitionerError):
    """A YAML document is refused. `line` counts from 1; 0 means the whole document."""

    def __init__(self, source: str, line: int, problem: str) -> None:
        where = f"{source}, line {line}" if line else source
        super().__init__(f"{where}: {problem}")
        self.source = source
        self.line = line
        self.problem = problem


class UnknownBoardError(PartitionerError):
    """The catalogue has no board of that name."""


class LayoutDoesNotFitError(PartitionerError):
    """What is wanted has no legal placement. `line` is that of the GPU in the layout file, or 0."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line
        self.problem = problem


class SimulationError(PartitionerError):
    """A simulated node cannot be described or put in place as asked."""


class NvmlError(PartitionerError):
    """Base of what goes wrong while talking to the NVML library."""


class NvmlUnavailableError(NvmlError):
    """This host has no NVML library, or its driver is not loaded."""


class NvmlCallError(NvmlError):
    """One call failed. `code` is NVML's own number."""

    def __init__(self, function: str, code: int, reason: str) -> None:
        super().__init__(
            f"NVML: {function} failed: {reason} (code {code}); "
            "look at the kernel log of the NVIDIA driver (dmesg), then try again"
        )
        self.function = function
        self.code = code
        self.reason = reason


class NvmlTimeoutError(NvmlError):
    """A call has not returned in time. The call itself may still be stuck inside the driver."""


class NvmlBusyError(NvmlError):
    """The bounded queue of waiting calls is full."""


class NvmlClosedError(NvmlError):
    """The reader was closed before or during the call."""


class GpuLostError(NvmlError):
    """The GPU asked about has fallen off the bus, or was never there."""


class StaleGenerationError(NvmlError):
    """The geometry changed after the caller looked: discover again, then decide again."""
