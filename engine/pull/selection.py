"""Which files of a repository serving needs: one set of weights, configuration, tokenizer.

Pure functions over names and sizes; nothing is opened. Invariant: what is chosen lies in the
repository's root under a plain name, so that no name can lead out of the directory it goes to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from engine.errors import CheckpointInvalid
from engine.link.pull import RemoteFile

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
REQUIRED = (CONFIG_FILE, TOKENIZER_FILE)
OPTIONAL = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What is read before anything is decided; published ones are a few kilobytes, an index a megabyte.
INSPECTED = (CONFIG_FILE, "generation_config.json", INDEX_FILE)
INSPECTED_BYTES_MAX = 16 << 20
FILE_BYTES_MAX = 1 << 44
SHOWN_MAX = 8

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def listing(found: Collection[RemoteFile]) -> dict[str, RemoteFile]:
    """The files of the repository's root by name; those below it are never needed."""
    return {file.name: file for file in found if _PLAIN.fullmatch(file.name)}


def inspected(files: Mapping[str, RemoteFile], repository: str) -> list[RemoteFile]:
    """What must be read to know the rest. Raises CheckpointInvalid if it cannot be a model."""
    for name in REQUIRED:
        if name not in files:
            raise _unfit(repository, f"it has no {name}", files)
    if WEIGHTS_FILE not in files and INDEX_FILE not in files:
        raise _unfit(repository, f"it has neither {WEIGHTS_FILE} nor {INDEX_FILE}", files)
    wanted = [name for name in INSPECTED if name in files]
    if WEIGHTS_FILE in files and INDEX_FILE in wanted:
        wanted.remove(INDEX_FILE)  # one file of weights wins, as when a checkpoint is opened
    for name in wanted:
        if files[name].size_bytes > INSPECTED_BYTES_MAX:
            raise _unfit(
                repository, f"its {name} has over {INSPECTED_BYTES_MAX} bytes", {name: files[name]}
            )
    return [files[name] for name in wanted]


def needed(
    files: Mapping[str, RemoteFile], shards: Collection[str], repository: str
) -> tuple[RemoteFile, ...]:
    """Everything to fetch, small files first. `shards` are the index's; empty without an index."""
    names = [*REQUIRED, *(name for name in OPTIONAL if name in files)]
    names += [INDEX_FILE, *sorted(shards)] if shards else [WEIGHTS_FILE]
    for name in names:
        if name not in files:
            raise _unfit(repository, f"its {INDEX_FILE} names {name}, which is not there", files)
        if not 0 <= files[name].size_bytes <= FILE_BYTES_MAX:
            raise _unfit(
                repository,
                f"the hub says that {name} has {files[name].size_bytes} bytes",
                {name: files[name]},
            )
    return tuple(files[name] for name in names)


def _unfit(repository: str, problem: str, files: Mapping[str, RemoteFile]) -> CheckpointInvalid:
    names = sorted(files, key=lambda name: -files[name].size_bytes)
    shown = ", ".join(names[:SHOWN_MAX]) + (", ..." if len(names) > SHOWN_MAX else "")
    return CheckpointInvalid(
        f"{repository} cannot be served: {problem}. In its root are: {shown or 'no files'}. Take a "
        "repository or revision with safetensors weights and a tokenizer.json",
        repository=repository,
    )
