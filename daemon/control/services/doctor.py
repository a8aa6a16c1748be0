"""hotbay.v1.DoctorService: what this host offers and lacks, as this daemon sees it.

It owns the one check that only a daemon that runs can make: that it does. Everything else is the
doctor's. The host is looked at anew with every call.
"""

from __future__ import annotations

import os

from hotbay.v1 import doctor_pb2

from daemon.control.config import Config
from daemon.control.doctor.host import SystemHost
from daemon.control.doctor.report import examination
from partitioner.bounded import BoundedNvml


class DoctorService:
    """`stored_max` is how many descriptors the service manager keeps; see `Notifier`."""

    def __init__(
        self, config: Config, nvml: BoundedNvml, stored_max: int | None, version: str
    ) -> None:
        self._config = config
        self._nvml = nvml
        self._host = SystemHost(stored_max)
        self._version = version

    async def Examine(self, request: doctor_pb2.ExamineRequest) -> doctor_pb2.Examination:
        found = f"{self._version}, pid {os.getpid()}"
        running = doctor_pb2.Check(
            name="hotbayd", state=doctor_pb2.CHECK_STATE_OK, found=f"runs: version {found}"
        )
        told = await examination(self._config, self._nvml, self._host)
        told.checks.insert(0, running)
        return told
