"""What a node of one's own is told where its maker says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hotbay.local_node import LocalNode


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "float32"),
        ({"worker": {"threads": 1}}, "float32"),
        ({"worker": {"dtype": "auto"}}, "auto"),
        ({"node": {"simulate": ""}}, None),
    ],
)
def test_a_simulated_node_computes_the_same_on_every_processor(
    tmp_path: Path, config: dict[str, Any], dtype: str | None
) -> None:
    told = LocalNode(tmp_path, config=config).config
    assert told.get("worker", {}).get("dtype") == dtype
