"""What probes look at, and what they say, as frozen values.

It owns the vocabulary of the report and nothing else. The invariant: a finding that is not OK
carries the line that mends it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from daemon.control.config import Config
from daemon.control.doctor.host import Host
from partitioner.gpu import Gpu


class State(StrEnum):
    """How it stands with one thing."""

    OK = "ok"
    # It works, but slower, or something that one might want cannot be done.
    WARNING = "warning"
    # Something that is configured, or that serving rests on, cannot work.
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """What there is, and a command or a line of a file that mends it."""

    state: State
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        assert bool(self.mend) == (self.state is not State.OK), self.found


@dataclass(frozen=True)
class Subject:
    """What is examined. `gpu_error` says why there are no `gpus`."""

    config: Config
    host: Host
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str = ""

    @property
    def simulated(self) -> bool:
        """Whether the GPUs are, so that no driver is needed."""
        return bool(self.config.node.simulate)


Probe = Callable[[Subject], Finding]


@dataclass(frozen=True)
class Check:
    """A finding with its name."""

    name: str
    finding: Finding


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(State.OK, found)


def warning(found: str, mend: str) -> Finding:
    """It works, but not as well as it could."""
    return Finding(State.WARNING, found, mend)


def missing(found: str, mend: str) -> Finding:
    """It cannot work so."""
    return Finding(State.MISSING, found, mend)
