"""Errors of gpuctl itself.

    CommandFailed       a command failed on its own account, not by the daemon's word

What the daemon refuses arrives as `hotbay.errors.HotbayError` and stays that.
"""

from __future__ import annotations

from daemon.gpuctl.exits import Exit


class CommandFailed(Exception):
    """The prompt, the gateway or the file is at fault; the message is for people."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.code = code
