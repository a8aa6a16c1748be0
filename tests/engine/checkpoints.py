"""Tiny random checkpoints of each family, their weights in the engine's layout, and the oracle.

Everything is float32 and seeded. The oracle is transformers' own model: logits of a whole sequence,
and greedy tokens from them, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.engine import Engine
from engine.kv_space import PlainKvSpace
from engine.limits import EngineLimits
from engine.link.tokens import Output, Sampling
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec

VOCABULARY = 211
PAGE_BYTES = 1 << 16
CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-no-groups": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-one-head": ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "mistral-window": ("mistral", {"sliding_window": 20, "num_hidden_layers": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 25, "max_window_layers": 1},
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 40}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3-tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


@dataclass
class Checkpoint:
    """A checkpoint on disk, and everything made from it."""

    directory: Path
    oracle: PreTrainedModel
    greedy_tokens: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_directory(self.directory)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return fused_weights(self.spec, self.oracle.state_dict())

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """The oracle's logits after each token, [tokens, vocabulary]."""
        return self.oracle(torch.tensor([list(tokens)])).logits[0]

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The oracle's next tokens, each from the whole sequence before it."""
        known = self.greedy_tokens.setdefault(tuple(prompt), [])
        if len(known) < count:
            sequence = torch.tensor([[*prompt, *known]])
            state = self.oracle(sequence, use_cache=True)
            while True:
                known.append(int(state.logits[0, -1].argmax()))
                if len(known) >= count:
                    break
                state = self.oracle(
                    torch.tensor([[known[-1]]]),
                    past_key_values=state.past_key_values,
                    use_cache=True,
                )
        return known[:count]


def make_checkpoint(directory: Path, shape: str, seed: int = 0, **changes: Any) -> Checkpoint:
    """Write a random checkpoint of a named shape, with every weight far from its initial value."""
    family, own = SHAPES[shape]
    config_class, model_class = CLASSES[family]
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(**(values | own | changes))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1.0 + 0.3 * torch.randn_like(weight))
            else:
                weight.copy_(0.15 * torch.randn_like(weight))
    model.save_pretrained(directory)
    return Checkpoint(directory, model)


def fused_weights(spec: ModelSpec, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The engine's tensors, stacked from transformers' as the recipes say."""
    weights = {}
    for recipe in image_recipes(spec):
        weights[recipe.name] = torch.cat([state[source] for source in recipe.sources])
        assert tuple(weights[recipe.name].shape) == recipe.shape, recipe.name
    return weights


def make_engine(checkpoint: Checkpoint, *, pages: int = 64, **limits: Any) -> Engine:
    """An engine over a checkpoint's weights and plain memory."""
    values: dict[str, Any] = {"context_tokens": 256, "running_requests_max": 64}
    space = PlainKvSpace(limits.pop("page_bytes", PAGE_BYTES), pages)
    return Engine(checkpoint.spec, checkpoint.weights, space, EngineLimits(**(values | limits)))


def greedy(max_tokens: int, **parameters: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **parameters)


def run(engine: Engine, steps_max: int = 10_000) -> dict[int, list[Output]]:
    """Step until nothing is left to do; outputs by request."""
    outputs: dict[int, list[Output]] = {}
    for _ in range(steps_max):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request, []).append(output)
    raise AssertionError(f"still work after {steps_max} steps")


def tokens_of(outputs: Sequence[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
