"""`hotbayd --doctor`: the report without a daemon, for people or as the API's message in JSON.

It starts nothing, locks nothing and changes nothing, so that it can be run beside a daemon that
runs or refuses to start.
"""

from __future__ import annotations

import asyncio

from google.protobuf.json_format import MessageToJson
from hotbay.v1 import doctor_pb2

from daemon.control.config import Config
from daemon.control.doctor.host import SystemHost
from daemon.control.doctor.report import examination
from daemon.control.notify import Notifier
from partitioner.bounded import BoundedNvml

EXIT_MISSING = 1
_WORDS = {
    doctor_pb2.CHECK_STATE_OK: "ok",
    doctor_pb2.CHECK_STATE_WARNING: "warning",
    doctor_pb2.CHECK_STATE_MISSING: "missing",
}


def report(config: Config, notifier: Notifier, *, as_json: bool) -> int:
    """Print the report; 0, or EXIT_MISSING."""
    told = asyncio.run(_examine(config, notifier))
    if as_json:
        print(MessageToJson(told, always_print_fields_with_no_presence=True))
    for each in () if as_json else told.checks:
        print(f"{_WORDS[each.state]:8} {each.name}: {each.found}")
        if each.mend:
            print(f"{'':8} to mend it: {each.mend}")
    states = {each.state for each in told.checks}
    return EXIT_MISSING if doctor_pb2.CHECK_STATE_MISSING in states else 0


async def _examine(config: Config, notifier: Notifier) -> doctor_pb2.Examination:
    nvml = BoundedNvml()
    try:
        return await examination(config, nvml, SystemHost(notifier.stored_max))
    finally:
        await nvml.close()
