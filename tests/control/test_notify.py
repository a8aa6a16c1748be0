"""What the service manager hears, over a real datagram socket."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.control.notify import Notifier, boot_id


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        yield sock


def test_messages_are_what_sd_notify_sends(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready("serving 2 models")
    assert manager.recv(4096) == b"READY=1\nSTATUS=serving 2 models"
    notifier.watchdog()
    assert manager.recv(4096) == b"WATCHDOG=1"
    notifier.stopping()
    assert manager.recv(4096) == b"STOPPING=1"
    notifier.extend_timeout(1.5)
    assert manager.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"


def test_stored_descriptor_is_the_same_file(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    memory = os.memfd_create("weights")
    os.write(memory, b"precious")
    notifier.store("image-abc", memory)
    os.close(memory)
    data, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(4))
    assert data == b"FDSTORE=1\nFDNAME=image-abc\nFDPOLL=0"
    (received,) = array.array("i", ancillary[0][2])
    assert os.pread(received, 64, 0) == b"precious"
    os.close(received)


def test_descriptors_come_back_by_name_once() -> None:
    code = """
import os
os.environ["LISTEN_PID"] = str(os.getpid())
from daemon.control.notify import Notifier
notifier = Notifier(os.environ)
stored = notifier.stored()
print({name: os.pread(fd, 64, 0).decode() for name, fd in stored.items()})
print([os.get_inheritable(fd) for fd in stored.values()], notifier.stored())
"""
    one, two = os.memfd_create("a"), os.memfd_create("b")
    os.write(one, b"first")
    os.write(two, b"second")
    # Descriptors 3 and 4 of the child, as systemd passes them.
    script = f"exec {sys.executable} -c '{code}' 3<&{one} 4<&{two}"
    done = subprocess.run(
        ["bash", "-c", script],
        pass_fds=(one, two),
        env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "image-x:image-y"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    os.close(one)
    os.close(two)
    assert done.stdout.splitlines() == [
        "{'image-x': 'first', 'image-y': 'second'}",
        "[False, False] {}",
    ], done.stderr


def test_nothing_happens_without_a_manager(tmp_path: Path) -> None:
    notifier = Notifier({})
    assert notifier.watchdog_interval_s is None
    notifier.ready("unheard")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).status("unheard too")
    assert notifier.stored() == {}


def test_watchdog_is_only_for_the_named_process() -> None:
    asked = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    assert Notifier(asked).watchdog_interval_s == 15
    assert Notifier({**asked, "WATCHDOG_PID": "1"}).watchdog_interval_s is None


def test_boot_id_is_the_kernels() -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
