"""Who else holds the image segments' descriptors, so that weights outlive hotbayd.

Every segment's descriptor is given to the gateway and, where there is one, to systemd's descriptor
store. Whoever dies, another holder's descriptor keeps the memory, and a starting hotbayd collects
them again. The module moves descriptors; the host store decides what is kept.
"""

from __future__ import annotations

import os

from daemon.control.errors import CallRefused
from daemon.control.notify import Notifier
from daemon.control.processes.gateway_client import GatewayClient
from engine.link.errors import LinkError

STORED_NAME_PREFIX = "image-"
# systemd refuses names longer than 255; a digest is shorter, and this keeps it so.
STORED_NAME_CHARACTERS_MAX = 200


class Custody:
    """Copies of descriptors in other hands. `gateway` is replaced when a new one is connected."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self.gateway: GatewayClient | None = None

    async def keep(self, digest: str, descriptor: int) -> None:
        """Give copies of a descriptor away. A gateway that is away gets it when it is back."""
        self._notifier.store(_stored_name(digest), descriptor)
        if self.gateway is not None and not self.gateway.closed:
            try:
                await self.gateway.keep(digest, descriptor)
            except LinkError:
                return  # the fleet brings the gateway back, and recovery keeps again

    async def drop(self, digest: str) -> None:
        """Have every other holder close its copy."""
        self._notifier.forget(_stored_name(digest))
        if self.gateway is not None and not self.gateway.closed:
            try:
                await self.gateway.drop(digest)
            except (LinkError, CallRefused):
                return

    async def recover(self) -> dict[str, int]:
        """Descriptors by digest from whoever holds them, the caller's to close."""
        found: dict[str, int] = {}
        for name, descriptor in self._notifier.stored().items():
            if name.startswith(STORED_NAME_PREFIX):
                found[name.removeprefix(STORED_NAME_PREFIX)] = descriptor
            else:
                os.close(descriptor)
        if self.gateway is not None and not self.gateway.closed:
            state = await self.gateway.describe()
            for digest in state.segments:
                if digest not in found:
                    try:
                        found[digest] = await self.gateway.fetch(digest)
                    except CallRefused:
                        continue  # dropped between the two questions
        return found


def _stored_name(digest: str) -> str:
    return (STORED_NAME_PREFIX + digest)[:STORED_NAME_CHARACTERS_MAX]
