"""Graphs without a device fail where a device would go wrong; which batch sizes are captured."""

from __future__ import annotations

import pytest
import torch

from engine.errors import GraphChanged
from engine.graphs import buckets_up_to
from engine.recorded_graphs import RecordedGraphs


def test_a_graph_whose_memory_moved_is_found() -> None:
    memory = {"kept": torch.ones(4)}
    total = torch.zeros(4)

    def work() -> None:
        total.copy_(memory["kept"] * 2)

    graph = RecordedGraphs().capture(work)
    graph.replay()
    memory["kept"] = memory["kept"].clone()
    with pytest.raises(GraphChanged, match="operation 0"):
        graph.replay()


def test_a_graph_that_comes_back_to_the_host_is_refused() -> None:
    value, kept = torch.ones(4), []
    with pytest.raises(GraphChanged, match="waits"):
        RecordedGraphs().capture(lambda: print(float(value.sum()))).replay()
    with pytest.raises(GraphChanged, match="kept"):
        RecordedGraphs().capture(lambda: kept.append(value * 2)).replay()


def test_buckets() -> None:
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(3) == (1, 2, 4)
    assert buckets_up_to(20) == (1, 2, 4, 8, 16, 24)
    assert buckets_up_to(4096)[-1] == 256
