"""Every error that this package raises, in one tree.

It owns the names callers catch; it never decides what to do about a failure. Each message says what
failed, on what, and what the reader can do.

    PartitionerError
    ├── DocumentError            a YAML document is refused; carries its source and line
    ├── UnknownBoardError        no board of that name in the catalogue
    ├── LayoutDoesNotFitError    no placement of what is wanted; carries the file's line
    ├── LayoutChangeError        a change of layout was given up; the old layout is there again
    │   ├── LayoutMovedError     somebody else has changed what was to be kept
    │   ├── InstanceHeldError    a process that is not ours uses what is to go; carries the pids
    │   │   └── ResetHeldError   the same, of a GPU that has to be reset
    │   ├── ChangeNotMadeError   the driver reports as done what cannot be seen
    │   ├── ChangeCancelledError somebody asked for it to stop
    │   └── NotRolledBackError   neither the new nor the old layout could be reached yet
    ├── MpsError                 a control daemon of MPS, or what it serves
    │   ├── MpsUnavailableError  this host has no control program, or cannot run it
    │   ├── MpsCommandError      the program says that a command failed
    │   ├── MpsAnswerError       its answer cannot be understood
    │   ├── MpsTimeoutError      a command, a start or an end was not done in time
    │   ├── MpsLimitError        a limit that was set reads back as another one
    │   └── MpsShareError        seen from inside, a share is not what it was made to be
    ├── SimulationError          a --simulate value, or the installing of the simulated library
    └── NvmlError
        ├── NvmlUnavailableError no usable NVML library or driver on this host
        ├── NvmlCallError        a call of the library failed; carries function and code
        │   ├── GpuInUseError       a change was refused, because a process uses what it would take
        │   └── PermissionMissingError  this process may not make it; says what right is missing
        ├── ResetNeededError     a change takes a reset of the GPU that is not meant or refused
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


class LayoutChangeError(PartitionerError):
    """A change of layout was given up. But for `NotRolledBackError` all is as it was."""


class LayoutMovedError(LayoutChangeError):
    """What is there is not what the plan was made for: plan again."""


class InstanceHeldError(LayoutChangeError):
    """Processes that are not ours use what is to be taken away."""

    def __init__(self, problem: str, pids: tuple[int, ...]) -> None:
        super().__init__(problem)
        self.pids = pids


class ResetHeldError(InstanceHeldError):
    """Processes that are not ours use a GPU that has to be reset to change its MIG mode."""


class ChangeNotMadeError(LayoutChangeError):
    """The driver said that it made a change, but reading it back shows that it did not."""


class ChangeCancelledError(LayoutChangeError):
    """The change was cancelled between two steps."""


class NotRolledBackError(LayoutChangeError):
    """Neither layout could be reached; the intent stays in the journal, to be settled later."""


class MpsError(PartitionerError):
    """Base of what goes wrong with MPS."""


class MpsUnavailableError(MpsError):
    """The control program is not there, or cannot be run."""


class MpsCommandError(MpsError):
    """The control program ended with an error."""


class MpsAnswerError(MpsError):
    """The control program's answer is none that is known."""


class MpsTimeoutError(MpsError):
    """What was asked of a control daemon was not done in time."""


class MpsLimitError(MpsError):
    """A limit is not in force although no command failed."""


class MpsShareError(MpsError):
    """A process in a share has more than its share, or cannot be there at all."""


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


class GpuInUseError(NvmlCallError):
    """The driver refuses a change, since some client holds what it would take away."""

    def __init__(self, function: str, code: int, what: str) -> None:
        NvmlError.__init__(
            self,
            f"{what} is in use by another client (NVML: {function}): end the processes on it, "
            "monitoring tools included, then try again",
        )
        self.function, self.code, self.reason = function, code, "in use by another client"


class PermissionMissingError(NvmlCallError):
    """The driver refuses a change to this process. `right` is what lets it."""

    def __init__(self, function: str, code: int, what: str, right: str) -> None:
        NvmlError.__init__(
            self, f"{what} is not allowed to this process (NVML: {function}): run hotbayd {right}"
        )
        self.function, self.code, self.reason = function, code, "no permission"


class ResetNeededError(NvmlError):
    """A change of MIG mode takes a reset of the GPU, which is not meant, or cannot be done."""


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
