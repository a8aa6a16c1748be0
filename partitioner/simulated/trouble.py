"""Trouble put upon a simulated node by words: XIDs, lost GPUs, failing and slow calls, health.

It owns what the words mean and which of them make sense. The node carries them out. The invariant:
what is refused has changed nothing, and the refusal names what there is instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import pynvml

from partitioner.errors import SimulationError
from partitioner.recovery_action import RecoveryAction
from partitioner.simulated.node import ANY_FUNCTION, Fault, SimulatedGpu, SimulatedNode
from partitioner.simulated.nvml_library import TABLES
from partitioner.strict_yaml import nearest

XID_MAX = 999
XID_RECOVERY_ACTION_CHANGED = 154
DELAY_S_MAX = 600.0
CALLS_MAX = 1_000_000
UNTOLD = "untold"
# What a GPU that wants a reset refuses until it has had one.
CUT_FUNCTIONS = (
    "nvmlDeviceSetMigMode",
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceDestroy",
)
_PREFIX = "NVML_ERROR_"
_ACTION = "recovery_action"
ERRORS: Mapping[str, int] = MappingProxyType(
    {
        name.removeprefix(_PREFIX): int(getattr(pynvml, name))
        for name in dir(pynvml)
        if name.startswith(_PREFIX)
    }
)


def find_gpu(node: SimulatedNode, target: str) -> tuple[SimulatedGpu, int | None]:
    """The GPU, and the number of the instance, that `gpu0`, `gpu0/3g.71gb@4` or a UUID means."""
    name, _, place = target.partition("/")
    number = name.removeprefix("gpu")
    for gpu in node.gpus:
        if gpu.uuid == name or (number.isdecimal() and gpu.index == int(number)):
            break
    else:
        known = (f"gpu{gpu.index}" for gpu in node.gpus)
        raise SimulationError(f"the simulated node has no GPU {name!r}; it has {', '.join(known)}")
    if not place:
        return gpu, None
    for each in gpu.instances:
        if str(each.place) == place:
            return gpu, each.number
    there = ", ".join(str(each.place) for each in gpu.instances) or "none"
    raise SimulationError(f"gpu{gpu.index} has no instance {place!r}; it has {there}")


def report_xid(node: SimulatedNode, target: str, number: int) -> str:
    """The driver reports an XID, of a GPU or of an instance."""
    gpu, instance = find_gpu(node, target)
    if not 0 < number <= XID_MAX:
        raise SimulationError(f"XID {number} is none: give one of 1 to {XID_MAX}")
    node.report(gpu.uuid, pynvml.nvmlEventTypeXidCriticalError, number, instance)
    return f"XID {number} was reported on {target}"


def vanish(node: SimulatedNode, target: str) -> str:
    """The GPU falls off the bus."""
    gpu, _ = find_gpu(node, target)
    node.vanish(gpu.uuid)
    return f"gpu{gpu.index} is lost"


def fail_calls(
    node: SimulatedNode, target: str, function: str, error: str, after_calls: int, times: int
) -> str:
    """Calls of a function (empty: of any) fail, on one GPU (empty: on any)."""
    uuid = find_gpu(node, target)[0].uuid if target else None
    name = error.upper().replace("-", "_").removeprefix(_PREFIX)
    if name not in ERRORS or name == "SUCCESS":
        raise SimulationError(
            f"NVML has no error {error!r}{nearest(name, [each.lower() for each in ERRORS])}"
        )
    _check_function(function)
    if not (0 <= after_calls <= CALLS_MAX and 0 <= times <= CALLS_MAX):
        raise SimulationError(f"calls are counted from 0 to {CALLS_MAX}")
    code = ERRORS[name]
    node.inject(Fault(code, function or ANY_FUNCTION, uuid, after_calls, times or None))
    often = f"{times} times" if times else "from then on"
    return f"{function or 'every call'} answers {name} after {after_calls} calls, {often}"


def delay_calls(node: SimulatedNode, function: str, delay_s: float) -> str:
    """Calls of a function take so much longer."""
    if not function:
        raise SimulationError("say which NVML function is to be slow")
    _check_function(function)
    if not 0 <= delay_s <= DELAY_S_MAX:
        raise SimulationError(f"a delay of {delay_s:g} s is not within 0 to {DELAY_S_MAX:g} s")
    node.set_latency(function, delay_s)
    return f"{function} takes {delay_s:g} s longer"


def set_health(
    node: SimulatedNode, target: str, action: str | None, changes: Mapping[str, int | bool]
) -> str:
    """Change what the driver tells of a GPU's health; a new recovery action is an XID 154 too."""
    gpu, _ = find_gpu(node, target)
    health = replace(gpu.health, **changes)  # type: ignore[arg-type]
    if action == UNTOLD:
        health = replace(health, recovery_action=None)
    elif action is not None:
        known = [each.name.lower() for each in RecoveryAction]
        word = action.lower().replace("-", "_")
        if word not in known:
            raise SimulationError(
                f"there is no recovery action {action!r}{nearest(word, known)}; there are "
                f"{', '.join([*known, UNTOLD])}"
            )
        health = replace(health, recovery_action=int(RecoveryAction[word.upper()]))
    elif not changes:
        raise SimulationError("say which field is to change")
    changed = health.recovery_action not in (None, gpu.health.recovery_action)
    gpu.health = health
    if changed:
        kind = pynvml.nvmlEventTypeXidCriticalError
        node.report(gpu.uuid, kind, XID_RECOVERY_ACTION_CHANGED)
    action_word = UNTOLD
    if health.recovery_action is not None:
        action_word = RecoveryAction.of(health.recovery_action).name.lower()
    words = [
        name.replace("_", " ") for name, value in vars(health).items() if value and name != _ACTION
    ]
    return f"gpu{gpu.index}: {', '.join([f'recovery action {action_word}', *words])}"


def want_reset(node: SimulatedNode, target: str) -> str:
    """The GPU wants a reset, and refuses to be cut anew before it."""
    gpu, _ = find_gpu(node, target)
    for function in CUT_FUNCTIONS:
        node.inject(Fault(pynvml.NVML_ERROR_RESET_REQUIRED, function, gpu.uuid))
    set_health(node, target, RecoveryAction.GPU_RESET.name, {})
    return f"gpu{gpu.index} wants a reset"


def _check_function(function: str, known: Iterable[str] = tuple(TABLES)) -> None:
    if function and function not in known:
        raise SimulationError(
            f"the simulated library answers no function {function!r}{nearest(function, known)}"
        )
