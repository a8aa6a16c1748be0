"""The header of a safetensors file, believed only as far as it agrees with itself and the file.

It owns the grammar and the limits; it never opens a file and never reads a weight. A file is: the
header's length (u64, little-endian), the header as a JSON object, then the tensors' bytes without
gaps. Invariant: tensors that were returned have known dtypes, cover the data exactly once from its
first byte to its last, and have as many bytes as dtype and shape say. Everything else raises
CheckpointInvalid, whatever the bytes are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from swap.errors import CheckpointInvalid

LENGTH_BYTES = 8
# Published ones have at most a few megabytes; of nothing but brackets, this much takes hundreds of
# megabytes to read as JSON.
HEADER_BYTES_MAX = 16 << 20
DIMENSIONS_MAX = 16
ELEMENTS_MAX = 1 << 48

BITS_PER_ELEMENT = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}

_METADATA = "__metadata__"
_SHOWN = 120


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of a file; `offset_bytes` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


def header_length(prefix: bytes, file_bytes: int, file: str) -> int:
    """Length of the header in bytes, from the file's first LENGTH_BYTES."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) != LENGTH_BYTES:
        raise _invalid(file, f"it has {file_bytes} bytes, too few for a header")
    if length > HEADER_BYTES_MAX:
        raise _invalid(file, f"its header has {length} bytes, over the limit {HEADER_BYTES_MAX}")
    if LENGTH_BYTES + length > file_bytes:
        raise _invalid(
            file, f"it was cut: a header of {length} bytes does not fit in {file_bytes} bytes"
        )
    return length


def parse_header(encoded: bytes, file_bytes: int, file: str) -> tuple[HeaderTensor, ...]:
    """The file's tensors in the order of their bytes. `file` names it in errors."""
    try:
        header = json.loads(encoded.decode(), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _invalid(file, f"its header is no JSON object: {str(error)[:_SHOWN]}") from error
    if not isinstance(header, dict):
        raise _invalid(file, "its header is no JSON object")
    _check_metadata(header.pop(_METADATA, {}), file)
    start = LENGTH_BYTES + len(encoded)
    tensors = [_tensor(name, entry, start, file) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes))
    position = start
    for tensor in tensors:
        if tensor.offset_bytes != position:
            what = "overlaps the one before" if tensor.offset_bytes < position else "leaves a hole"
            raise _invalid(file, f"tensor {tensor.name!r} {what} at byte {position}", tensor.name)
        position += tensor.size_bytes
    if position != file_bytes:
        what = "was cut" if position > file_bytes else "has bytes behind its last tensor"
        raise _invalid(file, f"it {what}: its tensors end at {position}, the file at {file_bytes}")
    return tuple(tensors)


def _tensor(name: str, entry: Any, start: int, file: str) -> HeaderTensor:
    shown = name[:_SHOWN]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(file, f"tensor {shown!r} has not dtype, shape and data_offsets", shown)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS_PER_ELEMENT.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _invalid(file, f"tensor {shown!r} has the unknown dtype {dtype!r:.{_SHOWN}}", shown)
    if not _are_counts(shape) or len(shape) > DIMENSIONS_MAX:
        raise _invalid(file, f"tensor {shown!r} has the shape {shape!r:.{_SHOWN}}", shown)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(file, f"tensor {shown!r} has the offsets {offsets!r:.{_SHOWN}}", shown)
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements > ELEMENTS_MAX:
            raise _invalid(file, f"tensor {shown!r} has over {ELEMENTS_MAX} elements", shown)
    size = offsets[1] - offsets[0]
    if elements * bits != size * 8:
        raise _invalid(
            file, f"tensor {shown!r} of {dtype} {shape} does not take {size} bytes", shown
        )
    return HeaderTensor(name, dtype, tuple(shape), start + offsets[0], size)


def _check_metadata(metadata: Any, file: str) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _invalid(file, f"its {_METADATA} is no map of texts")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= ELEMENTS_MAX
        for value in values
    )


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; where readers would disagree on what it says it is refused."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return result


def _invalid(file: str, problem: str, tensor: str | None = None) -> CheckpointInvalid:
    where = {"file": file} if tensor is None else {"file": file, "tensor": tensor}
    return CheckpointInvalid(f"checkpoint file {file}: {problem}; fetch it again", **where)
