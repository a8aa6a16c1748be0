"""Models from a hub: what pulling one means, where its files go, how it survives a restart.

It owns the directories of pulled checkpoints, DIRECTORY/OWNER--NAME/COMMIT, and the rules about
them; a puller fetches, the registry registers. It never speaks to a hub itself. Invariants: a
directory without `.partial` is a whole, checked checkpoint and is never written again; what was
fetched outlives every failure but a cancellation, and is not fetched again.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from daemon.control.actions.conductor import Conductor
from daemon.control.actions.routing import Router
from daemon.control.errors import CallRefused, Refused
from daemon.control.state.operations import Operations
from daemon.control.state.records import Intent, Kind, Operation, Plan, Pulled, Result, Stage
from daemon.control.state.registry import VERSION_NEXT
from daemon.control.state.running import Handle, Outcome, Request, foreseen
from daemon.control.state.world import World
from engine.link.pull import Fetch, Fetched, Resolve, Resolved

# Looking at a repository while the caller waits; hotbay.model_calls allows a little more.
RESOLVE_TIMEOUT_S = 20.0
REVISION_CHARACTERS_MAX = 200
# What no other try would mend: the files are of no use.
UNUSABLE = ("CHECKPOINT_INVALID", "ARCH_UNSUPPORTED")

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Puller(Protocol):
    """One puller process."""

    async def resolve(self, request: Resolve, timeout_s: float) -> Resolved: ...
    async def fetch(
        self, request: Fetch, timeout_s: float, on_progress: Callable[[int, int], None]
    ) -> Fetched: ...


Pullers = Callable[[str], AbstractAsyncContextManager[Puller]]


class Pulls:
    """Begins pulls, and carries them out."""

    def __init__(
        self,
        world: World,
        operations: Operations,
        conductor: Conductor,
        router: Router,
        pullers: Pullers,
    ) -> None:
        self._world = world
        self._operations = operations
        self._conductor = conductor
        self._router = router
        self._pullers = pullers
        self._config = world.config.models
        # Pulls share the network and the disk: the first come are served first.
        self._turns = asyncio.Semaphore(self._config.pulls_max)

    async def submit(
        self, request: Request, name: str, wanted: Pulled, *, validate_only: bool
    ) -> Operation:
        """Find what `wanted` is now and whether there is room, and begin to fetch it.

        With `validate_only` the answer is a finished operation without a name. Raises ControlError.
        """
        await self._conductor.admit()
        if not validate_only:
            existing = await self._operations.replay(request)
            if existing is not None:
                return existing
        _check(wanted)
        name = name or wanted.repository.rpartition("/")[2]
        self._world.registry.check_name(name, VERSION_NEXT)
        message, total_bytes = "it is here already", 0
        if _COMMIT.fullmatch(wanted.revision) and self.directory(wanted, wanted.revision).exists():
            commit = wanted.revision
        else:
            async with self._pullers(wanted.repository) as puller:
                resolved = await puller.resolve(self._ask(wanted), RESOLVE_TIMEOUT_S)
            commit = resolved.commit
            if not self.directory(wanted, commit).exists():
                total_bytes = await self._room(wanted, resolved)
                message = f"{len(resolved.files)} files, {total_bytes} bytes"
        source = Pulled(wanted.repository, wanted.revision, commit, wanted.token_file)
        intent = Intent(Kind.PULL, incoming=name, pulled=source)
        if not validate_only:
            return await self._operations.begin(request, intent, Plan(), claims(intent), self.run)
        directory = self.directory(wanted, commit)
        told = f"{wanted.repository}@{commit[:12]}: {message}, into {directory}"
        result = Result(name, "COLD", "", told)
        return foreseen(request, intent, Plan(), result, bytes_total=total_bytes)

    async def run(self, handle: Handle) -> Outcome:
        """Carry a pull out, or go on with one that a restart interrupted."""
        intent, source = handle.record.intent, handle.record.intent.pulled
        assert source is not None
        directory = self.directory(source, source.commit)
        received = "was here already"
        if not directory.exists():
            async with self._turns:
                received = f"fetched, {await self._bring(handle, source, directory)} bytes"
        handle.update(stage=Stage.VERIFYING)
        version = await self._world.registry.register(intent.incoming, directory, VERSION_NEXT)
        put = self._world.registry.put(version)
        self._router.publish_soon()
        message = f"{source.repository}@{source.commit[:12]} {received}, in {directory}"
        return Outcome(Result(version.key, "COLD", message=message), (put,))

    def directory(self, source: Pulled, commit: str) -> Path:
        """Where a repository's files at a commit are."""
        return Path(self._config.directory) / source.repository.replace("/", "--") / commit

    async def _bring(self, handle: Handle, source: Pulled, directory: Path) -> int:
        """Fetch into the partial directory and give it its name; the bytes that came for it."""
        partial = _partial(directory)
        try:
            handle.update(stage=Stage.FETCHING, message=f"fetching {source.repository}")
            async with self._pullers(source.repository) as puller:
                at_commit = Pulled(source.repository, source.commit, "", source.token_file)
                timeout_s = RESOLVE_TIMEOUT_S + self._config.patience_s
                ask = self._ask(at_commit, self._config.patience_s)
                resolved = await puller.resolve(ask, timeout_s)
                await self._room(source, resolved)
                await asyncio.to_thread(partial.mkdir, mode=0o700, parents=True, exist_ok=True)
                fetched = await puller.fetch(
                    Fetch(str(partial), self._config.pull_threads, self._config.patience_s),
                    self._config.pull_timeout_s,
                    lambda done, total: handle.update(bytes_done=done, bytes_total=total),
                )
            await asyncio.to_thread(partial.replace, directory)
        except asyncio.CancelledError:
            if handle.cancelling:  # and not a daemon that stops, whose successor goes on
                await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
            raise
        except CallRefused as error:
            if error.reason in UNUSABLE:
                await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
            raise
        except OSError as error:
            raise Refused(
                f"{partial} cannot be written: {error.strerror or error}: see [models] directory",
                reason="PULL_FAILED",
                metadata={"directory": str(partial)},
            ) from error
        return fetched.bytes_received

    def _ask(self, wanted: Pulled, patience_s: float = 0.0) -> Resolve:
        if self._config.offline:
            raise Refused(
                f"{wanted.repository} is not fetched: [models] offline or HF_HUB_OFFLINE is set. "
                "What was pulled before is had by its full commit",
                reason="HUB_REFUSED",
                metadata={"repository": wanted.repository},
            )
        return Resolve(
            repository=wanted.repository,
            endpoint=self._config.hub_endpoint,
            revision=wanted.revision,
            token_file=wanted.token_file or self._config.token_file,
            patience_s=patience_s,
        )

    async def _room(self, source: Pulled, resolved: Resolved) -> int:
        """Bytes of the checkpoint. Raises Refused (INSUFFICIENT_DISK) if they do not fit."""
        total_bytes = sum(file.size_bytes for file in resolved.files)
        partial = _partial(self.directory(source, resolved.commit))
        present_bytes, free_bytes = await asyncio.to_thread(_measure, partial)
        needed_bytes = max(0, total_bytes - present_bytes) + self._config.free_bytes_min
        if needed_bytes > free_bytes:
            raise Refused(
                f"{source.repository} takes {total_bytes} bytes, of which {present_bytes} are here "
                f"and {self._config.free_bytes_min} are to stay free ([models] free_bytes_min); "
                f"the disk of {self._config.directory} has {free_bytes} left: free "
                f"{needed_bytes - free_bytes} more, or move [models] directory",
                reason="INSUFFICIENT_DISK",
                metadata={
                    "needed_bytes": str(needed_bytes),
                    "free_bytes": str(free_bytes),
                    "directory": self._config.directory,
                },
            )
        return total_bytes


def claims(intent: Intent) -> tuple[str, ...]:
    """What a pull holds while it runs: the name, and the directory it fills."""
    source = intent.pulled
    assert source is not None
    return (f"model:{intent.incoming}", f"checkpoint:{source.repository}@{source.commit}")


def _check(wanted: Pulled) -> None:
    problem = ""
    if not _REPOSITORY.fullmatch(wanted.repository) or ".." in wanted.repository:
        field = "repository"
        problem = (
            f"{wanted.repository!r} is no repository: write OWNER/NAME, as in the hub's address"
        )
    elif len(wanted.revision) > REVISION_CHARACTERS_MAX or not wanted.revision.isprintable():
        field, problem = "revision", "the revision is no branch, tag or commit"
    elif wanted.token_file and not Path(wanted.token_file).is_absolute():
        field, problem = "token_file", f"{wanted.token_file!r} is not an absolute path"
    if problem:
        raise Refused(problem, reason="INVALID_ARGUMENT", metadata={"field": field})


def _partial(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


def _measure(partial: Path) -> tuple[int, int]:
    """Bytes that are in the directory, and bytes that its disk has left."""
    if partial.exists():
        present_bytes = sum(each.stat().st_size for each in partial.iterdir())
        return present_bytes, shutil.disk_usage(partial).free
    existing = next(each for each in partial.parents if each.exists())
    return 0, shutil.disk_usage(existing).free
