"""Whole nodes for whole tests: the real daemon, gateway and workers on the simulated board.

The oracle is transformers in fp32 on the example checkpoints, asked once for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hotbay.local_node import LocalNode
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[2] / "examples" / "models"
PROMPTS = {
    "prose": ("The licence", "You may copy", "This program is", "A class", "In this section"),
    "code": ("def main():", "class Node:", "import os", "for line in", "    return self"),
}

MEMORY_BYTES = 128 << 20

NodeMaker = Callable[..., LocalNode]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[NodeMaker]:
    """Starts nodes under the test's directory and ends them, whatever the test did to them."""
    nodes: list[LocalNode] = []

    def start(
        *,
        config: dict[str, dict[str, Any]] | None = None,
        repository: Path | None = REPOSITORY,
        simulate: str = "h200x1",
        load: tuple[str, ...] = (),
    ) -> LocalNode:
        # Small partitions: a worker makes all of its memory present when it starts.
        tables = {**(config or {})}
        tables["worker"] = {"memory_bytes": MEMORY_BYTES, **tables.get("worker", {})}
        node = LocalNode(
            tmp_path / f"node{len(nodes)}", simulate=simulate, repository=repository, config=tables
        )
        nodes.append(node)
        node.start()
        for model in load:
            node.client.wait(node.client.load(model))
        return node

    yield start
    for node in nodes:
        node.stop()


class Oracle:
    """What each example model greedily answers, by transformers in fp32."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}
        self._answers: dict[tuple[str, str, int], str] = {}

    def answer(self, model: str, prompt: str, tokens: int) -> str:
        """The continuation of `prompt` by at most `tokens` tokens, as text."""
        key = (model, prompt, tokens)
        if key not in self._answers:
            tokenizer, _ = self._load(model)
            self._answers[key] = self._generate(model, tokenizer(prompt).input_ids, tokens)
        return self._answers[key]

    def chat(self, model: str, question: str, tokens: int) -> str:
        """The answer to one user message, as text."""
        tokenizer, _ = self._load(model)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        return self._generate(model, ids, tokens)

    def _load(self, model: str) -> tuple[Any, Any]:
        if model not in self._loaded:
            directory = str(REPOSITORY / model / "1")
            self._loaded[model] = (
                AutoTokenizer.from_pretrained(directory),
                AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(),
            )
        return self._loaded[model]

    def _generate(self, model: str, prompt: list[int], tokens: int) -> str:
        tokenizer, network = self._load(model)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = network.generate(ids, max_new_tokens=tokens, do_sample=False)
        text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return text


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()
