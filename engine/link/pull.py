"""Messages between hotbayd and a puller (a socket pair, inherited as a descriptor).

A puller lives for one checkpoint of a hub: hotbayd asks `Resolve` what there is and what of it is
needed, decides whether that fits the disk, and has it brought with `Fetch`. A puller never decides
where a model goes and never registers one.
"""

from __future__ import annotations

import msgspec

from engine.link.build import Failed


class RemoteFile(msgspec.Struct, frozen=True):
    """A file of a repository, with the hashes that the hub gives: either of the two, or none."""

    name: str
    size_bytes: int
    sha256: str = ""
    git_sha1: str = ""
    """Of the file as a git blob."""


class Resolve(msgspec.Struct, frozen=True, tag=True):
    """Find the commit that a revision is, and which of its files serving needs.

    Answered by Resolved or Failed. For up to `patience_s` a hub that cannot be reached is asked
    again.
    """

    repository: str
    endpoint: str
    revision: str = ""
    """Empty: the repository's default branch."""
    token_file: str = ""
    patience_s: float = 0.0
    call: int = 0


class Resolved(msgspec.Struct, frozen=True, tag=True):
    """What would be fetched. The model is of a supported family."""

    call: int
    commit: str
    files: tuple[RemoteFile, ...]


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Fetch what was resolved into a directory, going on where an earlier fetch ended.

    Answered by Fetched or Failed; PullProgress comes meanwhile. The fetch is given up when no byte
    has come for `patience_s`.
    """

    directory: str
    threads: int = 4
    patience_s: float = 0.0
    call: int = 0


class PullProgress(msgspec.Struct, frozen=True, tag=True):
    """Bytes of the checkpoint that are on disk."""

    bytes_done: int
    bytes_total: int


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """Every file is there, with its size and hash, and together they are a sound checkpoint."""

    call: int
    bytes_received: int
    """Without what an earlier fetch had left."""


ToPuller = Resolve | Fetch
FromPuller = Resolved | PullProgress | Fetched | Failed
