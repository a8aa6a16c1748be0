"""Hotbay's public Python door: the control API's messages, its client, its errors and reasons.

    from hotbay import Client, errors

Importing the package loads nothing; `Client` brings grpc in when it is first asked for, so that
programs that only look at reasons or addresses start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotbay.client import Client as Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    if name == "Client":
        from hotbay.client import Client

        return Client
    raise AttributeError(f"module 'hotbay' has no attribute {name!r}")
