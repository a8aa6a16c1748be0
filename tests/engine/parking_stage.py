"""KV in plain memory beside a parking area, so that preempted requests can be parked.

What is worth parking is not left to how fast this machine is: the engine's clock moves by a second
with each look, the lane's stands still, and the link is as fast as the test says.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping
from typing import Any

import torch

from engine.engine import Engine
from engine.kv_layout import KvLayout
from engine.kv_space import PlainKvSpace
from engine.limits import EngineLimits
from engine.models.spec import ModelSpec
from engine.parking import KvLane
from swap.parking import ParkingArea

FAST_BYTES_PER_S, SLOW_BYTES_PER_S = 1e12, 1e-3


class PlainRows:
    """Of a device's memory, copies of rows at once: pages of a real one are too large here."""

    def copy_out_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        for row in range(rows):
            ctypes.memmove(destination + row * row_bytes, source + row * pitch_bytes, row_bytes)
        return 0

    def copy_in_rows(
        self, destination: int, source: int, row_bytes: int, rows: int, pitch_bytes: int
    ) -> int:
        for row in range(rows):
            ctypes.memmove(destination + row * pitch_bytes, source + row * row_bytes, row_bytes)
        return 0

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class ParkingStage:
    """`pages` pages for KV, and `parking_bytes` of host memory."""

    def __init__(
        self,
        pages: int,
        page_bytes: int,
        *,
        parking_bytes: int = 64 << 20,
        link_bytes_per_s: float = FAST_BYTES_PER_S,
    ) -> None:
        self.space = PlainKvSpace(page_bytes, pages)
        self.space.memory().view(torch.float32).fill_(float("nan"))
        self.area = ParkingArea(parking_bytes)
        self.link_bytes_per_s = link_bytes_per_s

    def engine(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor] | None,
        limits: EngineLimits,
        **given: Any,
    ) -> Engine:
        """An engine over this memory; one at a time."""
        ticks = itertools.count()
        return Engine(
            spec,
            weights,
            self.space,
            limits,
            make_lane=self._lane,
            clock=lambda: float(next(ticks)),
            **given,
        )

    def close(self) -> None:
        """Nothing is parked, and no page is held."""
        assert (self.area.used_bytes, self.space.pages) == (0, 0)
        self.area.close()

    def _lane(self, layout: KvLayout) -> KvLane:
        device: Any = PlainRows()
        return KvLane(
            device,
            self.area,
            layout,
            self.space.memory().data_ptr(),
            link_bytes_per_s=lambda: self.link_bytes_per_s,
            clock=lambda: 0.0,
        )
