"""What sharing a GPU costs and what takes memory beside the models: figures, as data.

It owns `sharing.yaml` and what a node adds to it. It decides nothing. The invariant: no figure of
this kind is written into code.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from partitioner.catalogue import Confidence
from partitioner.strict_yaml import StrictModel, parse

MIB = 1 << 20
Percent = Annotated[float, Field(ge=0, le=1000)]
Mib = Annotated[int, Field(ge=0, le=1 << 20)]


class _Mps(StrictModel):
    clients: Annotated[int, Field(ge=2)]
    time_per_token_percent: Percent
    throughput_percent: Annotated[float, Field(ge=0, lt=100)]
    threads_percent_in_all: Annotated[int, Field(ge=100, le=1000)]
    confidence: Confidence


class _SharingFile(StrictModel):
    version: Literal[1]
    mps: _Mps
    mps_weights_max_mib: Mib
    decode_reach_percent: Annotated[float, Field(gt=0, le=100)]
    mps_server_mib: Mib
    context_mib: Mib


@dataclass(frozen=True)
class Rules:
    """What packing reckons with.

    A worker takes `context_bytes` and `workspace_bytes` beside the pages of its models, an MPS
    server `server_bytes` once. `mps_time` and `mps_throughput` are what each other busy client
    costs, as a part of one; models with more than `mps_weights_max_bytes` take turns instead.
    """

    context_bytes: int
    workspace_bytes: int
    server_bytes: int
    page_bytes: int
    mps_time: float
    mps_throughput: float
    mps_threads_percent: int
    mps_weights_max_bytes: int
    decode_reach: float
    shares: bool = True
    """Whether GPUs and instances may be divided into MPS shares at all."""

    @property
    def worker_bytes(self) -> int:
        """What a worker takes beside its models."""
        return self.context_bytes + self.workspace_bytes

    def model_bytes(self, weights_bytes: int, kv_bytes: int) -> int:
        """What a model takes in whole pages."""
        page = self.page_bytes
        return (-(-weights_bytes // page) + -(-kv_bytes // page)) * page

    def threads_percent(self, clients: int) -> int:
        """The ceiling of each client's threads."""
        return min(100, self.mps_threads_percent // clients)


def load_rules(page_bytes: int, reserve_bytes: int, *, shares: bool = True) -> Rules:
    """The figures that ship, on a node whose workers keep `reserve_bytes` beside their pages.

    The reserve is what a worker leaves to CUDA and to what steps compute in, its context included.
    """
    resource = importlib.resources.files("partitioner").joinpath("sharing.yaml")
    file = parse(_SharingFile, resource.read_text("utf-8"), "partitioner/sharing.yaml")
    context_bytes = min(file.context_mib * MIB, reserve_bytes)
    return Rules(
        context_bytes=context_bytes,
        workspace_bytes=reserve_bytes - context_bytes,
        server_bytes=file.mps_server_mib * MIB,
        page_bytes=page_bytes,
        mps_time=file.mps.time_per_token_percent / 100 / (file.mps.clients - 1),
        mps_throughput=file.mps.throughput_percent / 100 / (file.mps.clients - 1),
        mps_threads_percent=file.mps.threads_percent_in_all,
        mps_weights_max_bytes=file.mps_weights_max_mib * MIB,
        decode_reach=file.decode_reach_percent / 100,
        shares=shares,
    )
