"""Other ways to get an image's weights onto a device, to measure beside a swap.

It owns a peer's copy of everything: parameters on the device, a safetensors file in memory, and on
a GPU a pinned mapping. Each way is timed from weights in host memory to weights on the device, with
no engine around it, which flatters it; what it takes is made ready beforehand. It never touches a
worker's memory. On the processor, where nothing is pinned and no other memory is a device's, a way
is its nearest analogue: `Peers.names` says which.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.worker import BuiltModel
from swap.device import REGISTER_BYTES_MAX
from swap.image import TensorEntry
from swap.segment import Mapping as SegmentMapping
from swap.segment import Segment
from swap.virtual_memory import VirtualMemory, view_of

_HOST_REGISTER_READ_ONLY = 8
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}

Tensors = Mapping[str, torch.Tensor]


class Peers:
    """Four ways over one image, on `device`. `close` gives all memory back.

    Takes the image's bytes once on the host, once on the device where `parameters` are not given,
    and once more on a GPU while two of the ways run.
    """

    def __init__(
        self, built: BuiltModel, device: torch.device, parameters: int | None = None
    ) -> None:
        """`parameters` is an address in host memory to keep the resident parameters at."""
        self._built = built
        self._device = device
        self._cuda = device.type == "cuda"
        self._entries = built.manifest.tensors
        self._stack = contextlib.ExitStack()
        self._present = self._stack.enter_context(built.segment.map())
        VirtualMemory().populate(self._present.address, self._present.size_bytes, write=False)
        if self._cuda:
            self._pin(self._present, writable=False)
        self._sources = self._views(self._present.address)
        if parameters is not None:
            self._resident = self._views(parameters)
        else:
            self._resident = {
                name: torch.empty_like(one, device=device) for name, one in self._sources.items()
            }
        self._file, self._backup = self._write_file()

    @property
    def names(self) -> dict[str, Callable[[], None]]:
        """The ways, by what they do."""
        if self._cuda:
            return {
                "module.to(device) from pageable memory": self._module_to,
                "safetensors' load_file(device=...)": self._load_file,
                "per-tensor copies from pinned memory": self._per_tensor,
                "copy out, copy in, as level-1 sleep": self._out_and_in,
            }
        return {
            "load_state_dict from memory not yet mapped (for module.to)": self._state_dict,
            "safetensors' load_file, then into the parameters": self._load_file,
            "per-tensor copies": self._per_tensor,
            "copy out, copy in, as level-1 sleep": self._out_and_in,
        }

    def seconds(self) -> dict[str, float]:
        """Take each way once."""
        taken = {}
        for name, way in self.names.items():
            self._settle()
            started = time.perf_counter()
            way()
            self._settle()
            taken[name] = time.perf_counter() - started
        return taken

    def close(self) -> None:
        """Give all memory back."""
        self._sources, self._resident, self._backup = {}, {}, {}
        self._stack.close()
        if self._cuda:
            torch.cuda.empty_cache()

    # The ways.

    def _module_to(self) -> None:
        # A mapping of its own: the other is pinned.
        with self._pageable() as sources:
            _module(sources).to(self._device)
            self._settle()

    def _state_dict(self) -> None:
        with self._pageable() as sources:
            module = _module(self._resident)
            module.load_state_dict({_plain(name): one for name, one in sources.items()})

    def _load_file(self) -> None:
        loaded = load_file(self._file, device=str(self._device))
        if not self._cuda:
            # It has mapped the file so far: what reads it is the copy.
            for name, parameter in self._resident.items():
                parameter.copy_(loaded[name])

    def _per_tensor(self) -> None:
        for name, parameter in self._resident.items():
            parameter.copy_(self._sources[name], non_blocking=True)

    def _out_and_in(self) -> None:
        for name, parameter in self._resident.items():
            self._backup[name].copy_(parameter, non_blocking=True)
        self._settle()
        self._per_tensor()

    # Inside.

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _pageable(self) -> Iterator[Tensors]:
        with self._built.segment.map() as mapping:
            yield self._views(mapping.address)

    def _views(self, address: int) -> dict[str, torch.Tensor]:
        return {one.name: _tensor(address + one.offset_bytes, one) for one in self._entries}

    def _pin(self, mapping: SegmentMapping, *, writable: bool) -> None:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        flags = 0 if writable else _HOST_REGISTER_READ_ONLY
        for offset in range(0, mapping.size_bytes, REGISTER_BYTES_MAX):
            size_bytes = min(REGISTER_BYTES_MAX, mapping.size_bytes - offset)
            status = int(runtime.cudaHostRegister(mapping.address + offset, size_bytes, flags))
            if status:
                raise RuntimeError(f"{size_bytes} bytes could not be pinned: CUDA error {status}")
            self._stack.callback(runtime.cudaHostUnregister, mapping.address + offset)

    def _write_file(self) -> tuple[Path, dict[str, torch.Tensor]]:
        """A safetensors file in memory; its tensors are also what weights are copied out to."""
        header: dict[str, dict[str, object]] = {}
        places: dict[str, int] = {}
        end = 0
        for one in self._entries:
            header[one.name] = {
                "dtype": _DTYPE_NAMES[one.dtype],
                "shape": one.shape,
                "data_offsets": (end, end + one.size_bytes),
            }
            places[one.name] = end
            end += one.size_bytes
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + len(encoded)
        segment = self._stack.enter_context(Segment.create(start + end, "safetensors"))
        os.pwrite(segment.descriptor, len(encoded).to_bytes(8, "little") + encoded, 0)
        filling = self._stack.enter_context(segment.map_for_filling(huge_pages=False))
        filling.populate(0, filling.size_bytes)
        if self._cuda:
            self._pin(filling, writable=True)
        backup = {}
        for one in self._entries:
            backup[one.name] = _tensor(filling.address + start + places[one.name], one)
            backup[one.name].copy_(self._sources[one.name])
        return Path(f"/proc/self/fd/{segment.descriptor}"), backup


def _tensor(address: int, entry: TensorEntry) -> torch.Tensor:
    flat = torch.frombuffer(view_of(address, entry.size_bytes), dtype=getattr(torch, entry.dtype))
    return flat.view(entry.shape)


def _plain(name: str) -> str:
    """A name that a parameter may have."""
    return name.replace(".", "_")


def _module(tensors: Tensors) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(_plain(name), torch.nn.Parameter(tensor, requires_grad=False))
    return module
