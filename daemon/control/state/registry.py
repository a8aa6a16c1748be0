"""Which models there are: names, their versions, labels, and what inspecting each told.

It owns the table of versions, fills it from the repository at start and by registration, and turns
what people write (`name`, `name@3`, `name@production`) into a version. It never loads weights: an
image builder reads configuration and headers. The invariant: a version either has facts or a reason
why it has none, and facts belong to the files as they were when they were read.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from daemon.control.errors import ControlError, ProcessFailed, Refused
from daemon.control.state.failures import Failed, failure_of
from daemon.control.state.journal import Contents, Put
from daemon.control.state.records import CanaryPrompt, Facts, Failure, Version
from engine.link.build import Inspected

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT_LABEL = "production"
SUGGESTIONS_MAX = 3
FILES_MAX = 10_000
VERSION_MAX = 1 << 31
# As a wish: one more than the newest.
VERSION_NEXT = 0
# Part of every fingerprint: raise it when inspecting learns to tell more.
FACTS_FORMAT = 2

log = logging.getLogger(__name__)


class Inspector(Protocol):
    """What reads a checkpoint's configuration and headers; an image builder does."""

    async def inspect(self, directory: Path, dtype: str) -> Inspected: ...


Inspectors = Callable[[], AbstractAsyncContextManager[Inspector]]


@dataclass(frozen=True)
class Found:
    """A version's directory, in the repository or registered."""

    name: str
    version: int
    directory: Path
    source: str = "repository"


class Registry:
    """The versions by key, and the labels. `dtype` is what weights are cast to."""

    def __init__(self, inspectors: Inspectors, dtype: str, models_max: int) -> None:
        self._inspectors = inspectors
        self._dtype = dtype
        self._models_max = models_max
        self._versions: dict[str, Version] = {}
        self._models: dict[str, dict[int, Version]] = {}
        self._labels: dict[str, dict[str, int]] = {}

    # Asking.

    def __getitem__(self, key: str) -> Version:
        return self._versions[key]

    def get(self, key: str) -> Version | None:
        return self._versions.get(key)

    def versions(self) -> list[Version]:
        """Every version, by name and number."""
        return sorted(self._versions.values(), key=lambda each: (each.name, each.version))

    def names(self) -> list[str]:
        return sorted(self._models)

    def of(self, name: str) -> list[Version]:
        """The versions of a model, oldest first. Raises Refused (MODEL_NOT_FOUND)."""
        if name not in self._models:
            raise self._not_found(name)
        return [each for _, each in sorted(self._models[name].items())]

    def labels(self, name: str) -> dict[str, int]:
        return dict(self._labels.get(name, {}))

    def default(self, name: str) -> Version:
        """What the bare name means: the version labelled `production`, else the newest usable."""
        versions = self.of(name)
        labelled = self._labels.get(name, {}).get(DEFAULT_LABEL)
        for each in versions:
            if each.version == labelled:
                return each
        return next((each for each in reversed(versions) if each.failure is None), versions[-1])

    def resolve(self, text: str) -> Version:
        """The version that `name`, `name@version` or `name@label` means; may be a failed one.

        Raises Refused (MODEL_NOT_FOUND) with what was perhaps meant.
        """
        name, at, which = text.partition("@")
        if not at:
            return self.default(name)
        versions = self.of(name)
        number = int(which) if which.isdecimal() else self._labels.get(name, {}).get(which)
        for each in versions:
            if each.version == number:
                return each
        known = [str(each.version) for each in versions] + sorted(self._labels.get(name, {}))
        raise Refused(
            f"model {name} has no version or label {which!r}; it has {', '.join(known)}",
            reason="MODEL_NOT_FOUND",
            metadata={"model": text},
        )

    def of_digest(self, digest: str) -> list[str]:
        """Keys of the versions whose image this is."""
        return [each.key for each in self.versions() if each.digest == digest]

    # Changing. What changes is handed back to be written.

    def restore(self, contents: Contents) -> None:
        """Take in what the journal holds."""
        for version in contents.versions:
            self.put(version)
        for label in contents.labels:
            self._labels.setdefault(label.model, {})[label.label] = label.version

    def put(self, version: Version) -> Put:
        self._versions[version.key] = version
        self._models.setdefault(version.name, {})[version.version] = version
        return Put(version)

    def learn_digest(self, key: str, digest: str) -> list[Put]:
        """Note which image a version has; empty when that was known."""
        version = self._versions.get(key)
        if version is None or version.digest == digest:
            return []
        return [self.put(msgspec.structs.replace(version, digest=digest))]

    def pin(self, key: str, pinned: bool) -> Put:
        """Note whether a user wants a version's image to stay in host memory."""
        return self.put(msgspec.structs.replace(self._versions[key], pinned=pinned))

    def set_canary(self, key: str, canary: CanaryPrompt | None) -> list[Put]:
        """Note a version's canary; empty when that was known."""
        version = self._versions.get(key)
        if version is None or version.canary == canary:
            return []
        return [self.put(msgspec.structs.replace(version, canary=canary))]

    async def scan(self, repository: Path | None) -> list[Put]:
        """Bring the table up to date with DIR/name/version/. Bad checkpoints are listed as FAILED.

        Only new and changed directories are read, and all whose weights are to have another dtype
        than before. Registered ones are, too; where one cannot be read, its version stays as it is:
        its image may be in memory still.
        """
        found: list[Found] = []
        changes: list[Put] = []
        if repository is not None:
            found, strange = await asyncio.to_thread(_list, repository)
            for path in strange:
                log.warning("%s is not name/version/ with a numbered version: ignored", path)
            changes = [self.put(gone) for gone in self._gone(found)]
        stale: list[tuple[Found, str]] = []
        for item in (*found, *self._registered(found)):
            print_ = await asyncio.to_thread(fingerprint, item.directory, self._dtype)
            known = self._versions.get(f"{item.name}@{item.version}")
            if known is None or known.fingerprint != print_:
                stale.append((item, print_))
        while stale:
            async with self._inspectors() as inspector:
                while stale:
                    item, print_ = stale.pop(0)
                    version = await self._inspect(inspector, item, print_)
                    if version.failure is None or item.source == "repository":
                        changes.append(self.put(version))
                    if not version.fingerprint:
                        break  # the inspector died of it: the others get a new one
        return changes

    async def register(self, name: str, directory: Path, version: int) -> Version:
        """Inspect a checkpoint. Gives the version to be `put`, or the equal one there is already.

        Raises Refused, or Failed with what is wrong with the checkpoint.
        """
        self.check(name, directory, version)
        print_ = await asyncio.to_thread(fingerprint, directory, self._dtype)
        present = list(self._models.get(name, {}).values())
        for each in present:
            same = Path(each.directory) == directory and each.fingerprint == print_
            if same and version in (0, each.version) and each.failure is None:
                return each
            if each.version == version and not (
                each.failure is not None and Path(each.directory) == directory
            ):
                raise Refused(
                    f"{each.key} is registered already, from {each.directory}: give another "
                    "version, or 0 for the next one",
                    reason="MODEL_EXISTS",
                    metadata={"model": each.key, "directory": each.directory},
                )
        number = version or max((each.version for each in present), default=0) + 1
        async with self._inspectors() as inspector:
            item = Found(name, number, directory, "api")
            inspected = await self._inspect(inspector, item, print_)
        if inspected.failure is not None:
            raise Failed(inspected.failure)
        return inspected

    def check(self, name: str, directory: Path, version: int) -> None:
        """Raises Refused (INVALID_ARGUMENT or QUEUE_FULL) naming the field."""
        self.check_name(name, version)
        problem = ""
        if not directory.is_absolute():
            problem = f"{str(directory)!r} is not an absolute path"
        elif not (directory / "config.json").is_file():
            problem = f"{directory} holds no config.json: it must be a checkpoint's directory"
        if problem:
            raise Refused(problem, reason="INVALID_ARGUMENT", metadata={"field": "directory"})

    def check_name(self, name: str, version: int) -> None:
        """Raises Refused (INVALID_ARGUMENT or QUEUE_FULL): could a version be called so?"""
        problem = ""
        if not NAME.fullmatch(name):
            field = "name"
            problem = (
                f"{name!r} is no model name: letters, digits, `.`, `_` and `-`, at most 64, "
                "beginning with a letter or digit"
            )
        elif not 0 <= version < VERSION_MAX:
            field, problem = "version", f"version {version} is not between 0 and {VERSION_MAX - 1}"
        if problem:
            raise Refused(problem, reason="INVALID_ARGUMENT", metadata={"field": field})
        if len(self._versions) >= self._models_max:
            raise Refused(
                f"{self._models_max} versions are registered already (limits.models_max)",
                reason="QUEUE_FULL",
                metadata={"limit": str(self._models_max)},
            )

    # Inside.

    async def _inspect(self, inspector: Inspector, item: Found, print_: str) -> Version:
        facts: Facts | None = None
        failure: Failure | None = None
        try:
            told = await inspector.inspect(item.directory, self._dtype)
            facts = msgspec.convert(told, Facts, from_attributes=True)
        except ProcessFailed as error:
            # That may pass, so it is not remembered for these files: the next scan tries again.
            failure, print_ = failure_of(error), ""
        except ControlError as error:
            failure = failure_of(error)
        if failure is not None:
            log.warning("%s@%d is unusable: %s", item.name, item.version, failure.message)
        known = self._versions.get(f"{item.name}@{item.version}")
        return Version(
            name=item.name,
            version=item.version,
            directory=str(item.directory),
            source=item.source,
            created_s=time.time(),
            fingerprint=print_,
            facts=facts,
            failure=failure,
            pinned=known is not None and known.pinned,
            canary=known.canary if known is not None else None,
        )

    def _gone(self, found: Iterable[Found]) -> list[Version]:
        present = {(item.name, item.version) for item in found}
        gone = []
        for each in self._versions.values():
            if each.source == "repository" and (each.name, each.version) not in present:
                failure = Failure(
                    "CHECKPOINT_INVALID",
                    f"{each.directory} is no longer in the repository: put it back",
                    {"directory": each.directory},
                )
                if each.failure != failure:
                    gone.append(msgspec.structs.replace(each, failure=failure, fingerprint=""))
        return gone

    def _registered(self, found: Iterable[Found]) -> list[Found]:
        present = {(item.name, item.version) for item in found}
        return [
            Found(each.name, each.version, Path(each.directory), each.source)
            for each in self.versions()
            if each.source == "api" and (each.name, each.version) not in present
        ]

    def _not_found(self, name: str) -> Refused:
        near = difflib.get_close_matches(name, self.names(), n=SUGGESTIONS_MAX, cutoff=0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        return Refused(
            f"there is no model {name!r}{hint}",
            reason="MODEL_NOT_FOUND",
            metadata={"model": name} | ({"suggestions": ",".join(near)} if near else {}),
        )


def fingerprint(directory: Path, dtype: str) -> str:
    """Changes when a file of the checkpoint does, by name, size and time of change."""
    digest = hashlib.sha256(f"{FACTS_FORMAT} {dtype} {directory}".encode())
    try:
        for path in sorted(directory.iterdir())[:FILES_MAX]:
            status = path.stat()
            digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    except OSError as error:
        # What cannot be read now is read again at the next look.
        digest.update(f"\n{error} {time.time_ns()}".encode())
    return digest.hexdigest()


def _list(repository: Path) -> tuple[list[Found], list[Path]]:
    found: list[Found] = []
    strange: list[Path] = []
    for model in sorted(path for path in repository.iterdir() if path.is_dir()):
        if model.name.startswith("."):
            continue
        for path in sorted(child for child in model.iterdir() if child.is_dir()):
            number = int(path.name) if path.name.isdecimal() else 0
            if NAME.fullmatch(model.name) and 0 < number < VERSION_MAX:
                found.append(Found(model.name, number, path.absolute()))
            elif not path.name.startswith("."):
                strange.append(path)
    return found, strange
