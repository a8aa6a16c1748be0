"""The state of a simulated node: its GPUs, and the faults, delays and stalls put upon it.

It owns what the simulated library answers from. It never knows of ctypes or pynvml. The invariant:
the state follows from the description and from the calls made here, nothing else: the same
description gives the same UUIDs and bus addresses in every process and on every day. Everything
here may be used from any thread.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace

from partitioner.catalogue import Board
from partitioner.errors import SimulationError
from partitioner.geometry import MIB, Instance
from partitioner.simulated.events import EventSets, SimulatedEvent
from partitioner.simulation import NodeSpec, ProcessSpec

ANY_FUNCTION = "*"
RESET_REQUIRED = 16
"""NVML's code for it."""
FIRST_HANDLE = 0x5EED0000
_FIRST_INSTANCE_HANDLE = 0x5EEE0000

_UUID_NAMESPACE = uuid.UUID("6f1c7d52-2b54-4a0e-9d0e-0f5a5a3c1b7e")
_FIRST_BUS = 0x10
_BUS_STEP = 8


@dataclass(frozen=True)
class SimulatedInstance:
    """A GPU instance with, unless it is only half made, one compute instance: the MIG device.

    `number` is what NVML calls its id. `handle`, `device_handle` and `compute_handle` are what
    callers hold of the instance, of its MIG device and of its compute instance.
    """

    number: int
    place: Instance
    uuid: str
    handle: int
    device_handle: int
    compute_handle: int
    complete: bool = True


@dataclass
class SimulatedHealth:
    """What the driver tells of a GPU's health. `recovery_action` None: it does not know the field.

    Numbers and words are NVML's.
    """

    recovery_action: int | None = 0
    uncorrected_errors: int = 0
    rows_pending: bool = False
    rows_failed: bool = False
    thermal_slowdown: bool = False
    power_slowdown: bool = False


@dataclass
class SimulatedGpu:
    """One GPU's mutable state. `handle` is the opaque number that NVML's callers hold."""

    index: int
    uuid: str
    handle: int
    board_key: str
    board: Board
    numa_node: int | None
    pcie_root: int | None
    mig_current: bool
    mig_pending: bool
    processes: tuple[ProcessSpec, ...]
    instances: tuple[SimulatedInstance, ...] = ()
    temperature_c: int = 33
    utilization_percent: int = 0
    lost: bool = False
    health: SimulatedHealth = field(default_factory=SimulatedHealth)

    @property
    def bus(self) -> int:
        """The PCI bus number; domain, device and function are 0."""
        return _FIRST_BUS + _BUS_STEP * self.index

    @property
    def used_bytes(self) -> int:
        """What processes hold, driver reserve excluded."""
        return sum(process.memory_mib for process in self.processes) * MIB

    def holds(self, instance: SimulatedInstance) -> bool:
        """Whether a process uses this instance."""
        return any(process.on == str(instance.place) for process in self.processes)

    @property
    def power_mw(self) -> int:
        """A tenth of the limit at rest, rising to the limit with utilisation."""
        return self.board.power_limit_w * (100 + 9 * self.utilization_percent)


@dataclass(frozen=True)
class Fault:
    """An NVML error to be answered instead of the truth.

    It strikes calls of `function` (or of any) on the GPU with `gpu_uuid` (or on any), after
    `after_calls` matching calls have passed, `times` times (None: for ever).
    """

    code: int
    function: str = ANY_FUNCTION
    gpu_uuid: str | None = None
    after_calls: int = 0
    times: int | None = None

    def ends_with_reset(self, gpu: SimulatedGpu) -> bool:
        """Whether it is that this GPU wants a reset."""
        return self.code == RESET_REQUIRED and self.gpu_uuid == gpu.uuid


@dataclass
class _ArmedFault:
    fault: Fault
    seen: int = 0

    @property
    def ahead(self) -> bool:
        fault = self.fault
        return fault.times is not None and self.seen < fault.after_calls + fault.times

    def strikes(self, function: str, gpu: SimulatedGpu | None) -> bool:
        fault = self.fault
        if fault.function not in (ANY_FUNCTION, function):
            return False
        if fault.gpu_uuid is not None and (gpu is None or gpu.uuid != fault.gpu_uuid):
            return False
        self.seen += 1
        struck = self.seen - fault.after_calls
        return struck > 0 and (fault.times is None or struck <= fault.times)


@dataclass(frozen=True)
class Stall:
    """A function that does not return until `released` is set. `entered` tells that one waits."""

    entered: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class SimulatedNode:
    """A node's GPUs and what has been done to them. `sleep` is how injected latency passes."""

    def __init__(
        self,
        spec: NodeSpec,
        sleep: Callable[[float], None] = time.sleep,
        changed: Callable[[SimulatedNode], None] = lambda node: None,
    ) -> None:
        self.driver_version = spec.driver_version
        self.cuda_version = spec.cuda_version
        self.gpus: tuple[SimulatedGpu, ...] = tuple(
            SimulatedGpu(
                index=index,
                uuid=f"GPU-{uuid.uuid5(_UUID_NAMESPACE, f'{gpu.board_key}/{index}')}",
                handle=FIRST_HANDLE + 16 * index,
                board_key=gpu.board_key,
                board=gpu.board,
                numa_node=gpu.numa_node,
                pcie_root=gpu.pcie_root,
                mig_current=gpu.mig_enabled,
                mig_pending=gpu.mig_enabled,
                processes=gpu.processes,
            )
            for index, gpu in enumerate(spec.gpus)
        )
        by_handle = {gpu.handle: gpu for gpu in self.gpus}
        self.events = EventSets(lambda handle: by_handle[handle].lost)
        self._next_handle = _FIRST_INSTANCE_HANDLE
        self._changed = changed
        for gpu, described in zip(self.gpus, spec.gpus, strict=True):
            gpu.instances = tuple(
                self.make_instance(gpu, number, place)
                for number, place in enumerate(described.instances, start=1)
            )
        self.opened = 0
        """How often its library is initialised now."""
        # Symbols that this node's library lacks, to play an older driver.
        self.hidden_symbols: frozenset[str] = frozenset()
        self._sleep = sleep
        self._lock = threading.Lock()
        self._faults: list[_ArmedFault] = []
        self._latencies_s: dict[str, float] = {}
        self._stalls: dict[str, Stall] = {}
        self._calls: dict[str, int] = {}

    def gpu(self, gpu_uuid: str) -> SimulatedGpu:
        """Return the GPU with this UUID; raises `SimulationError`."""
        for gpu in self.gpus:
            if gpu.uuid == gpu_uuid:
                return gpu
        known = ", ".join(gpu.uuid for gpu in self.gpus)
        raise SimulationError(f"the simulated node has no GPU {gpu_uuid}; it has {known}")

    def make_instance(
        self, gpu: SimulatedGpu, number: int, place: Instance, complete: bool = True
    ) -> SimulatedInstance:
        """An instance as a value, with handles that were never given before.

        The UUID follows from board, number and place: one that is made again has the old one, as
        on real boards.
        """
        first, self._next_handle = self._next_handle, self._next_handle + 3
        name = f"{gpu.board_key}/{gpu.index}/{number}/{place}"
        return SimulatedInstance(
            number=number,
            place=place,
            uuid=f"MIG-{uuid.uuid5(_UUID_NAMESPACE, name)}",
            handle=first,
            device_handle=first + 1,
            compute_handle=first + 2,
            complete=complete,
        )

    def cut(self, gpu: SimulatedGpu, instances: tuple[SimulatedInstance, ...]) -> None:
        """Let these be the instances of a GPU from now on."""
        gpu.instances = tuple(sorted(instances, key=lambda each: each.place))
        self._changed(self)

    def set_mig(self, gpu: SimulatedGpu, enabled: bool, at_once: bool) -> None:
        """Let MIG mode be this from now on, or else from the next reset on."""
        gpu.mig_pending = enabled
        if at_once:
            gpu.mig_current = enabled
        self._changed(self)

    def end_processes(self, pids: Container[int]) -> None:
        """Let these processes be gone, from every GPU."""
        for gpu in self.gpus:
            gpu.processes = tuple(each for each in gpu.processes if each.pid not in pids)

    def reset(self, gpu: SimulatedGpu) -> bool:
        """Reset a GPU that nobody uses: its instances go, and the MIG mode that waits comes.

        Whoever has the library open uses it, as on a real host.
        """
        if gpu.processes or gpu.lost or self.opened:
            return False
        gpu.mig_current = gpu.mig_pending
        if gpu.health.recovery_action is not None:
            gpu.health = replace(gpu.health, recovery_action=0)
        with self._lock:
            self._faults = [each for each in self._faults if not each.fault.ends_with_reset(gpu)]
        self.cut(gpu, ())
        return True

    def inject(self, fault: Fault) -> None:
        """Arm a fault; the first armed fault that strikes a call decides its answer."""
        with self._lock:
            self._faults.append(_ArmedFault(fault))

    @property
    def faults_ahead(self) -> int:
        """How many armed faults of a limited number of times have not struck as often yet."""
        with self._lock:
            return sum(each.ahead for each in self._faults)

    def set_latency(self, function: str, latency_s: float) -> None:
        """Make every call of `function` take this much longer; 0 takes the delay away."""
        with self._lock:
            self._latencies_s[function] = latency_s

    def stall(self, function: str) -> Stall:
        """Make calls of `function` hang, as a stuck driver does, until the stall is released."""
        with self._lock:
            return self._stalls.setdefault(function, Stall())

    def vanish(self, gpu_uuid: str) -> None:
        """Let a GPU fall off the bus: whatever touches it is answered with GPU_IS_LOST."""
        self.gpu(gpu_uuid).lost = True
        self.events.look_again()

    def report(self, gpu_uuid: str, kind: int, data: int, instance: int | None = None) -> None:
        """Let the driver report an event, once, to whoever is registered for its kind."""
        self.events.post(SimulatedEvent(self.gpu(gpu_uuid).handle, kind, data, instance))

    def clear_injections(self) -> None:
        """Take every fault, delay and stall away, release what hangs, make every GPU well."""
        with self._lock:
            stalls = tuple(self._stalls.values())
            self._faults.clear()
            self._latencies_s.clear()
            self._stalls.clear()
        for stall in stalls:
            stall.released.set()
        for gpu in self.gpus:
            gpu.lost = False
            gpu.health = SimulatedHealth()

    def calls_of(self, function: str) -> int:
        """How often a function of the library was called so far."""
        with self._lock:
            return self._calls.get(function, 0)

    def before_call(self, function: str, gpu: SimulatedGpu | None) -> int | None:
        """Count a call, pass its delays, and return the code to answer, or None for the truth."""
        with self._lock:
            self._calls[function] = self._calls.get(function, 0) + 1
            stall = self._stalls.get(function)
            latency_s = self._latencies_s.get(function, 0.0)
            armed = next((each for each in self._faults if each.strikes(function, gpu)), None)
        if stall is not None:
            stall.entered.set()
            stall.released.wait()
        if latency_s > 0:
            self._sleep(latency_s)
        return armed.fault.code if armed is not None else None
