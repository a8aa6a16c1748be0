"""Reading a checkpoint: a directory of safetensors files, found, checked and read in chunks.

It owns the open files; memory for one chunk is each reader's. It never maps a file (one that is cut
under a mapping kills the process) and never writes. Files that the page cache does not hold already
are read past it, which costs a fraction of the processor's time and leaves the cache to others.
Nothing is believed: shard names that lead out of the directory, files that are no regular files, an
index that its shards contradict and headers that do not add up all raise CheckpointInvalid, before
any weight is read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from swap.cast import FORMATS, cast
from swap.direct_file import DirectFile, ReadBuffer
from swap.errors import CheckpointInvalid
from swap.image import ITEM_BYTES
from swap.page_cache import cached_bytes
from swap.safetensors_header import (
    LENGTH_BYTES,
    HeaderTensor,
    header_length,
    parse_header,
    without_duplicates,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
INDEX_BYTES_MAX = 16 << 20
SHARDS_MAX = 512
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of the checkpoint; `file` counts its files, `offset_bytes` from its file's start."""

    name: str
    file: int
    offset_bytes: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """An open checkpoint. `read_into` and `chunks` may be called from several threads at once."""

    def __init__(
        self, files: tuple[tuple[str, int], ...], tensors: Mapping[str, CheckpointTensor]
    ) -> None:
        self.tensors = tensors
        self.size_bytes = sum(os.fstat(descriptor).st_size for _, descriptor in files)
        self._files = tuple(
            DirectFile.over(descriptor, Path(name), direct=_mostly_uncached(descriptor))
            for name, descriptor in files
        )
        self._closed = False

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Open `model.safetensors`, or else the shards of its index. Raises CheckpointInvalid."""
        folder = Path(directory)
        shards = {SINGLE_FILE: None} if (folder / SINGLE_FILE).exists() else read_index(folder)
        files: list[tuple[str, int]] = []
        tensors: dict[str, CheckpointTensor] = {}
        found: dict[str, str] = {}
        try:
            for shard, names in shards.items():
                files.append((shard, _open_regular(folder / shard)))
                for tensor in _read_header(*files[-1]):
                    if tensor.name in found:
                        raise _invalid(
                            f"tensor {tensor.name} is both in {found[tensor.name]} and in {shard}",
                            tensor=tensor.name,
                        )
                    found[tensor.name] = shard
                    if names is None or tensor.name in names:
                        tensors[tensor.name] = _located(tensor, len(files) - 1)
                for name in sorted((names or set()) - tensors.keys()):
                    raise _invalid(
                        f"{INDEX_FILE} says that tensor {name} is in {shard}, and it is not",
                        tensor=name,
                        file=shard,
                    )
            return cls(tuple(files), tensors)
        except BaseException:
            for _, descriptor in files:
                os.close(descriptor)
            raise

    def statuses(self) -> tuple[tuple[str, os.stat_result], ...]:
        """Each file's name and its state now: of the open file, whatever the name leads to now."""
        if self._closed:
            raise ValueError("the checkpoint is closed")
        try:
            return tuple((file.path.name, os.fstat(file.descriptor)) for file in self._files)
        except OSError as error:
            raise _invalid(f"a file's state cannot be read: {error}") from error

    def chunks(
        self, name: str, dtype: str, buffer: ReadBuffer | None = None
    ) -> Iterator[memoryview]:
        """The tensor's elements as `dtype`, in order, CHUNK_BYTES of the file at a time.

        Each piece is bytes, valid until the next is asked for. A reader of many tensors brings a
        buffer of CHUNK_BYTES of its own. Raises CheckpointInvalid when the dtype cannot be cast or
        the file has become shorter.
        """
        tensor = self._get(name)
        file = self._files[tensor.file]
        buffer = buffer or ReadBuffer(min(CHUNK_BYTES, tensor.size_bytes))
        end = tensor.offset_bytes + tensor.size_bytes
        for start in range(tensor.offset_bytes, end, CHUNK_BYTES):
            try:
                chunk = file.fetch(buffer, start, min(start + CHUNK_BYTES, end))
            except EOFError as error:
                raise _shorter(file.path.name) from error
            except OSError as error:
                raise _unreadable(file.path.name, error) from error
            yield cast(np.frombuffer(chunk, np.uint8), tensor.dtype, dtype).data

    def read_into(self, name: str, destination: memoryview, dtype: str) -> None:
        """Read a whole tensor as `dtype` into a writable buffer of exactly its size."""
        tensor = self._get(name)
        expected = tensor.size_bytes // _item_bytes(tensor) * ITEM_BYTES[dtype]
        if destination.nbytes != expected:
            raise ValueError(f"{name} as {dtype} takes {expected} bytes, not {destination.nbytes}")
        if expected == 0:
            return
        target, position = destination.cast("B"), 0
        for chunk in self.chunks(name, dtype):
            target[position : position + len(chunk)] = chunk
            position += len(chunk)

    def close(self) -> None:
        """Close all files. Idempotent."""
        if not self._closed:
            self._closed = True
            for file in self._files:
                file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _get(self, name: str) -> CheckpointTensor:
        if self._closed:
            raise ValueError("the checkpoint is closed")
        tensor = self.tensors.get(name)
        if tensor is None:
            raise _invalid(f"the checkpoint has no tensor {name}", tensor=name)
        return tensor


def read_index(folder: Path) -> dict[str, set[str] | None]:
    """Shards in the order of their names, each with the tensors the index puts there."""
    path = folder / INDEX_FILE
    if not path.exists():
        raise _invalid(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    descriptor = _open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > INDEX_BYTES_MAX:
            raise _invalid(f"{INDEX_FILE} has {size} bytes, over the limit {INDEX_BYTES_MAX}")
        encoded = bytearray(size)
        _read_all(descriptor, memoryview(encoded), 0, INDEX_FILE)
    finally:
        os.close(descriptor)
    try:
        index: Any = json.loads(encoded.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"{INDEX_FILE} is no JSON: {error}") from error
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise _invalid(f"{INDEX_FILE} has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise _invalid(f"{INDEX_FILE} puts {name[:120]} into {shard!r:.120}: no file name")
        shards.setdefault(shard, set()).add(name)
    if len(shards) > SHARDS_MAX:
        raise _invalid(f"{INDEX_FILE} names {len(shards)} shards, over the limit {SHARDS_MAX}")
    return {shard: shards[shard] for shard in sorted(shards)}


def _is_plain_name(shard: str) -> bool:
    """Whether a shard's name stays in the checkpoint's own directory."""
    return (
        shard.endswith(".safetensors")
        and os.path.basename(shard) == shard
        and "\0" not in shard
        and shard.isprintable()
    )


def _open_regular(path: Path) -> int:
    """Open a file for reading; a link is followed, since downloads are kept as links to blobs."""
    try:
        # Without O_NONBLOCK opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise _invalid(f"{path.name} cannot be opened: {error}", file=path.name) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _invalid(f"{path.name} is no regular file", file=path.name)
    return descriptor


def _read_header(file: str, descriptor: int) -> tuple[HeaderTensor, ...]:
    size = os.fstat(descriptor).st_size
    length = header_length(os.pread(descriptor, LENGTH_BYTES, 0), size, file)
    encoded = bytearray(length)
    _read_all(descriptor, memoryview(encoded), LENGTH_BYTES, file)
    return parse_header(bytes(encoded), size, file)


def _read_all(descriptor: int, view: memoryview, offset: int, file: str) -> None:
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise _unreadable(file, error) from error
        if count == 0:
            raise _shorter(file)
        view, offset = view[count:], offset + count


def _located(tensor: HeaderTensor, file: int) -> CheckpointTensor:
    return CheckpointTensor(
        tensor.name, file, tensor.offset_bytes, tensor.size_bytes, tensor.dtype, tensor.shape
    )


def _item_bytes(tensor: CheckpointTensor) -> int:
    if tensor.dtype not in FORMATS:
        raise _invalid(f"tensor {tensor.name} has dtype {tensor.dtype}", tensor=tensor.name)
    return ITEM_BYTES[FORMATS[tensor.dtype]]


def _mostly_uncached(descriptor: int) -> bool:
    return cached_bytes(descriptor) * 2 < os.fstat(descriptor).st_size


def _unreadable(file: str, error: OSError) -> CheckpointInvalid:
    return _invalid(f"{file} cannot be read: {error}", file=file)


def _shorter(file: str) -> CheckpointInvalid:
    return _invalid(f"{file} became shorter while it was read", file=file)


def _invalid(message: str, **metadata: str) -> CheckpointInvalid:
    return CheckpointInvalid(message, **metadata)
