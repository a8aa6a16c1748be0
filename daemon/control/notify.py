"""What hotbayd tells systemd: readiness, status, watchdog, and descriptors to keep.

Speaks sd_notify's datagrams itself (a dozen lines; the protocol is text and stable, documented in
sd_notify(3) and sd_listen_fds(3)). Without a notify socket everything is a no-op. The watchdog is
fed from the main loop, never from a thread, so that a stuck loop is found.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Mapping

FIRST_STORED_DESCRIPTOR = 3


class Notifier:
    """One process's connection to its service manager.

    `environment` is the process's environment, passed in so that only the configuration reads it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._stored = _stored_descriptors(environment)
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        kept = environment.get("FDSTORE", "-1")
        self.stored_max: int | None = int(kept) if address and kept.lstrip("-").isdigit() else None
        """How many descriptors are kept; -1 where systemd (before 254) does not tell, None without.
        """
        for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_interval_s: float | None = (
            int(watchdog_us) / 2e6 if watchdog_us.isdigit() and for_us else None
        )
        """How often to call `watchdog`: half of what systemd asks for. None: not at all."""

    def ready(self, status: str) -> None:
        """Recovery is done and requests are answered."""
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def stopping(self) -> None:
        """The daemon is draining."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The main loop is alive."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for this much more time to start or stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def store(self, name: str, descriptor: int) -> None:
        """Have systemd keep a descriptor beyond this process's life, under `name`."""
        self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", (descriptor,))

    def forget(self, name: str) -> None:
        """Have systemd close what it keeps under `name`."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def stored(self) -> dict[str, int]:
        """Descriptors kept from an earlier start, by name. They are the caller's to close."""
        stored, self._stored = self._stored, {}
        return stored

    def _send(self, text: str, descriptors: tuple[int, ...] = ()) -> None:
        if not self._address:
            return
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            if descriptors
            else []
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendmsg([text.encode()], ancillary, 0, self._address)
            except OSError:
                # A service manager that went away must not take the daemon with it.
                return


def _stored_descriptors(environment: Mapping[str, str]) -> dict[str, int]:
    if environment.get("LISTEN_PID", "") != str(os.getpid()):
        return {}
    count = int(environment.get("LISTEN_FDS", "0") or "0")
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    stored: dict[str, int] = {}
    for index in range(count):
        descriptor = FIRST_STORED_DESCRIPTOR + index
        os.set_inheritable(descriptor, False)
        name = names[index] if index < len(names) and names[index] else f"unnamed-{index}"
        if name in stored:
            os.close(descriptor)
        else:
            stored[name] = descriptor
    return stored


def boot_id() -> str:
    """The kernel's boot id; what was written under another one describes a world that is gone."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
