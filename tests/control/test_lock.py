"""One daemon a directory, whatever became of the one before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from daemon.control.errors import AlreadyRunning
from daemon.control.lock import DirectoryLock

HOLD = """
import sys
from pathlib import Path
from daemon.control.lock import DirectoryLock
lock = DirectoryLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_second_holder_is_refused_by_name(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(AlreadyRunning, match=f"pid {holder.pid}") as caught:
            DirectoryLock.acquire(tmp_path)
        assert caught.value.metadata["directory"] == str(tmp_path)
        holder.kill()
        holder.wait()
    # The kernel dropped the lock with its holder: nothing is stale.
    lock = DirectoryLock.acquire(tmp_path)
    lock.release()
    lock.release()
    DirectoryLock.acquire(tmp_path).release()


def test_directory_is_made_private(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "run"
    lock = DirectoryLock.acquire(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    lock.release()
    directory.chmod(0o755)
    DirectoryLock.acquire(directory).release()
    assert directory.stat().st_mode & 0o777 == 0o700


def test_lock_file_is_never_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("precious")
    (tmp_path / "hotbayd.lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        DirectoryLock.acquire(tmp_path)
    assert target.read_text() == "precious"
