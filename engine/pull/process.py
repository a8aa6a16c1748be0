"""The puller's process: one request after the other from hotbayd, until the socket closes.

It owns the socket and the process's bounds (memory, precedence, its end with hotbayd's); the hub
and the files are its neighbours'. It never sees a segment or a device and never imports torch.
Invariant: every Resolve and Fetch is answered once, by its reply or by Failed, and the process ends
when the socket closes, in the middle of a fetch too: what is on disk then is gone on with later.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError, PullError
from engine.link.build import Failed
from engine.link.errors import LinkError
from engine.link.frames import Link
from engine.link.pull import (
    Fetch,
    Fetched,
    FromPuller,
    PullProgress,
    RemoteFile,
    Resolve,
    Resolved,
    ToPuller,
)
from engine.models.layout import check_all_used, image_recipes
from engine.models.spec import ModelSpec
from engine.pull.fetch import Fetcher, Patience
from engine.pull.hub import Hub, read_token
from engine.pull.selection import INDEX_FILE, inspected, listing, needed
from swap.build import check_sources
from swap.checkpoint import Checkpoint, read_index
from swap.errors import SwapError

THREADS_MAX = 32
# Several chunks for each thread, and what the interpreter takes; a hub's answer must not take all.
ADDRESS_SPACE_BYTES_MAX = 8 << 30
NICENESS = 10
PROGRESS_INTERVAL_S = 0.1
REQUESTS_WAITING_MAX = 2


@dataclass(frozen=True)
class Found:
    """A repository at a commit, and what of it is needed."""

    hub: Hub
    commit: str
    files: tuple[RemoteFile, ...]


def resolve(request: Resolve, given_up: threading.Event) -> Found:
    """Look at the repository. Raises EngineError or SwapError."""
    hub = Hub(request.endpoint, request.repository, read_token(request.token_file))
    patience = Patience(request.patience_s, given_up)
    commit, everything = patience.call(lambda: hub.list(request.revision))
    files = listing(everything)
    small = inspected(files, request.repository)
    with tempfile.TemporaryDirectory(prefix="hotbay-pull-") as scratch:
        fetcher = Fetcher(
            hub, commit, Path(scratch), patience_s=request.patience_s, given_up=given_up
        )
        fetcher.fetch_all(tuple(small), 1)
        ModelSpec.from_directory(scratch)  # before gigabytes come: is it a family we serve?
        indexed = any(file.name == INDEX_FILE for file in small)
        shards = read_index(Path(scratch)) if indexed else ()
        return Found(hub, commit, needed(files, tuple(shards), request.repository))


def check(directory: Path) -> None:
    """Whether what arrived is a sound checkpoint. Raises EngineError or SwapError."""
    spec = ModelSpec.from_directory(directory)
    with Checkpoint.open(directory) as checkpoint:
        recipes = image_recipes(spec)
        check_sources(checkpoint, recipes)
        check_all_used(recipes, checkpoint.tensors)


class Puller:
    """Serves one link until it closes."""

    def __init__(self, link: Link[Any]) -> None:
        self._link = link
        self._found: Found | None = None
        self._given_up = threading.Event()

    async def serve(self) -> None:
        """Answer requests one after the other; returns when the link is closed."""
        requests: asyncio.Queue[ToPuller] = asyncio.Queue(REQUESTS_WAITING_MAX)
        worker = asyncio.create_task(self._answer_all(requests))
        try:
            while True:
                request, _ = await self._link.receive()
                await requests.put(request)
        except LinkError:
            self._given_up.set()
        finally:
            worker.cancel()
            self._link.close()

    async def _answer_all(self, requests: asyncio.Queue[ToPuller]) -> None:
        while True:
            request = await requests.get()
            reply: FromPuller
            try:
                if isinstance(request, Resolve):
                    reply = await self._resolve(request)
                else:
                    reply = await self._fetch(request)
            except (EngineError, SwapError) as error:
                reply = Failed(request.call, error.reason, str(error), error.metadata)
            except Exception as error:  # a bug or the system's refusal: say it, do not vanish
                reply = Failed(request.call, "INTERNAL", f"the puller failed: {error!r}")
            try:
                await self._link.send(reply)
            except LinkError:
                return
            except Exception as error:  # as above: hotbayd must not wait for what cannot be sent
                what = f"the puller's reply cannot be sent: {error!r}"
                await self._link.send(Failed(request.call, "INTERNAL", what))

    async def _resolve(self, request: Resolve) -> Resolved:
        self._found = found = await asyncio.to_thread(resolve, request, self._given_up)
        return Resolved(request.call, found.commit, found.files)

    async def _fetch(self, request: Fetch) -> Fetched:
        found, directory = self._found, Path(request.directory)
        if found is None or not 0 < request.threads <= THREADS_MAX:
            raise PullError(f"a fetch needs a Resolve before it and 1 to {THREADS_MAX} threads")
        total = sum(file.size_bytes for file in found.files)
        fetcher = Fetcher(
            found.hub,
            found.commit,
            directory,
            patience_s=request.patience_s,
            given_up=self._given_up,
        )
        telling = asyncio.create_task(self._tell(fetcher, total))
        try:
            await asyncio.to_thread(fetcher.fetch_all, found.files, request.threads)
        finally:
            telling.cancel()
        self._link.post(PullProgress(total, total))
        await asyncio.to_thread(check, directory)
        return Fetched(request.call, fetcher.received_bytes)

    async def _tell(self, fetcher: Fetcher, total: int) -> None:
        told = -1
        while True:
            done = fetcher.present_bytes
            if done != told:
                self._link.post(PullProgress(done, total))
                told = done
            await asyncio.sleep(PROGRESS_INTERVAL_S)


async def _run(descriptor: int) -> None:
    link: Link[Any] = Link(socket.socket(fileno=descriptor), ToPuller, name="hotbayd")
    await Puller(link).serve()
    # Threads may be waiting for a hub; nothing they hold needs an orderly end.
    os._exit(0)


def main(arguments: list[str] | None = None) -> int:
    """Entry of the process: `python -m engine.pull.process --descriptor N --for REPOSITORY`."""
    parser = argparse.ArgumentParser(prog="engine.pull.process", description=__doc__)
    parser.add_argument("--descriptor", type=int, required=True, help="socket to hotbayd")
    parser.add_argument("--for", dest="what", default="", help="shown by ps; not used")
    descriptor: int = parser.parse_args(arguments).descriptor
    # An interrupt typed at a terminal goes to hotbayd, which closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES_MAX, ADDRESS_SPACE_BYTES_MAX))
    os.nice(NICENESS)
    asyncio.run(_run(descriptor))
    return 0


if __name__ == "__main__":
    sys.exit(main())
