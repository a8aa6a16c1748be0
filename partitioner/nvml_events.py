"""Hearing of a driver's XIDs as they happen, in a thread of its own.

It owns that thread, its own initialisation of NVML and its event set. It judges nothing, and calls
nothing of NVML but what events need, so that it may stand beside the thread that does all else.
The invariants: every wait is bounded, so that closing is; a GPU that is lost does not keep it from
hearing of the others; trouble with NVML never ends it, and is retried after a pause.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml

from partitioner.nvml_gate import NvmlGate

WAIT_MS = 200
RETRY_S = 5.0
CLOSE_TIMEOUT_S = 5.0
_WHOLE_GPU = 0xFFFFFFFF
_XID = pynvml.nvmlEventTypeXidCriticalError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class XidEvent:
    """An XID of a GPU, by UUID; `instance` is NVML's number of the GPU instance, if it has one."""

    gpu: str
    xid: int
    instance: int | None


class EventThread:
    """Hears events from `start` to `close`.

    `heard` and `lost` are called in the thread: with each XID, and whenever some GPU is lost.
    """

    def __init__(
        self,
        heard: Callable[[XidEvent], None],
        lost: Callable[[], None],
        retry_s: float = RETRY_S,
        gate: NvmlGate | None = None,
    ) -> None:
        self._gate = gate or NvmlGate()
        self._heard = heard
        self._lost = lost
        self._retry_s = retry_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="NVML events", daemon=True)
        self._told = False
        self.hearing = threading.Event()
        """Set once events are registered for."""

    def start(self) -> None:
        """Begin to hear."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, within CLOSE_TIMEOUT_S unless the driver is stuck. Idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._open_and_hear()
            except pynvml.NVMLError as error:
                self._pause(error)

    def _open_and_hear(self) -> None:
        """Until something changes, or NVML is to be let go of."""
        with self._gate.using():
            pynvml.nvmlInit()
            try:
                self._hear()
            finally:
                with suppress(pynvml.NVMLError):
                    pynvml.nvmlShutdown()

    def _hear(self) -> None:
        events = pynvml.nvmlEventSetCreate()
        try:
            missing = self._register(events)
            # A GPU that was lost may be back: then it has to be registered for anew.
            until_s = time.monotonic() + (self._retry_s if missing else math.inf)
            self.hearing.set()
            self._told = False
            while not (self._closing.is_set() or self._gate.wanted) and time.monotonic() < until_s:
                try:
                    found = pynvml.nvmlEventSetWait_v2(events, WAIT_MS)
                except pynvml.NVMLError as error:
                    if error.value == pynvml.NVML_ERROR_TIMEOUT:
                        continue
                    if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                        # It names no GPU, and would say so again at once: begin without it.
                        self._lost()
                        return
                    raise
                self._take(found)
        finally:
            with suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(events)

    def _register(self, events: Any) -> bool:
        """Register for every GPU that answers; whether one did not."""
        missing = False
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                pynvml.nvmlDeviceRegisterEvents(handle, _XID, events)
            except pynvml.NVMLError as error:
                missing = missing or error.value != pynvml.NVML_ERROR_NOT_SUPPORTED
                log.info("XIDs of GPU %d are not heard: %s", index, error)
        return missing

    def _take(self, found: Any) -> None:
        try:
            uuid = str(pynvml.nvmlDeviceGetUUID(found.device))
        except pynvml.NVMLError as error:
            log.warning("XID %d of a GPU that does not answer: %s", found.eventData, error)
            self._lost()
            return
        instance = int(found.gpuInstanceId)
        self._heard(
            XidEvent(uuid, int(found.eventData), None if instance == _WHOLE_GPU else instance)
        )

    def _pause(self, error: Any) -> None:
        if not self._told:
            log.warning("XIDs are not heard now: %s", error)
            self._told = True
        self._closing.wait(self._retry_s)
