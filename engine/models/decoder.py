"""The decoder of the four families: Llama, Mistral, Qwen2 and Qwen3.

They differ in two places: Qwen2 adds a bias to queries, keys and values, and Qwen3 normalises each
query and key head before it is rotated; the rest is Llama's. A decoder owns views of weights and
nothing else: it never allocates KV and never decides what is computed. Invariant: a layer's weights
are first touched after `gate.wait(layer)`, so a step can run behind the copy that brings them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as functional

from engine.kernels.kv_scales import kv_scales
from engine.kernels.protocol import Kernels, NormWeights
from engine.models.layout import EMBEDDING_LAYER, layer_prefix
from engine.models.spec import ModelSpec

Weights = Mapping[str, torch.Tensor]
"""Tensors by the names that `image_recipes` gives them."""


class Gate(Protocol):
    """Whether weights have arrived."""

    def wait(self, layer: int) -> None:
        """Return once the weights of `layer` are there; raise when they will not come."""


class OpenGate:
    """The gate of weights that are all there."""

    def wait(self, layer: int) -> None:
        """Return at once."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    head_norms: NormWeights | None
    attention_output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, spec: ModelSpec, weights: Weights, layer: int) -> Self:
        prefix = layer_prefix(layer)
        norms = None
        if spec.query_key_norm:
            norms = (weights[prefix + "query_norm"], weights[prefix + "key_norm"])
        return cls(
            attention_norm=weights[prefix + "attention_norm"],
            qkv=weights[prefix + "qkv"],
            qkv_bias=weights[prefix + "qkv_bias"] if spec.qkv_bias else None,
            head_norms=norms,
            attention_output=weights[prefix + "attention_output"],
            mlp_norm=weights[prefix + "mlp_norm"],
            gate_up=weights[prefix + "gate_up"],
            down=weights[prefix + "down"],
        )


class Decoder:
    """One model over its weights and a device's operations."""

    def __init__(self, spec: ModelSpec, weights: Weights, kernels: Kernels, gate: Gate) -> None:
        self._epsilon = spec.norm_epsilon
        self._kernels = kernels
        self._gate = gate
        self._embedding = weights["embedding"]
        self._layers = [Layer.of(spec, weights, layer) for layer in range(spec.layers)]
        self._spec = spec
        self._scaled = [kernels.kv_scales is None] * spec.layers
        """Whether a layer's scales are there: they follow from weights that may be yet to come."""
        self._norm = weights["norm"]
        self._head = weights["embedding" if spec.tied else "head"]

        self.addresses = tuple(weights[name].data_ptr() for name in sorted(weights))
        """Where the weights are: what a captured graph holds on to."""

    def forward(self, tokens: torch.Tensor, plan: Any, rows: torch.Tensor | None) -> torch.Tensor:
        """Compute `tokens` [n], store their KV, and return logits [len(rows), vocabulary].

        `plan` comes from the kernels; `rows` are the tokens whose successors are wanted, None for
        all of them.
        """
        kernels, epsilon = self._kernels, self._epsilon
        self._gate.wait(EMBEDDING_LAYER)
        residual = functional.embedding(tokens, self._embedding)
        added = torch.zeros_like(residual)
        for index, layer in enumerate(self._layers):
            self._gate.wait(index)
            self._scale(index, layer)
            hidden = kernels.add_rms_norm(added, residual, layer.attention_norm, epsilon)
            qkv = kernels.linear(hidden, layer.qkv, layer.qkv_bias)
            queries = kernels.rotate_and_store(index, qkv, layer.head_norms, epsilon, plan)
            attended = kernels.attend(index, queries, plan)
            if rows is not None and index == len(self._layers) - 1:
                # All KV is stored now; from here on only the wanted rows matter.
                attended, residual = attended[rows], residual[rows]
            added = kernels.linear(attended, layer.attention_output)
            hidden = kernels.add_rms_norm(added, residual, layer.mlp_norm, epsilon)
            gate_up = kernels.linear(hidden, layer.gate_up)
            added = kernels.linear(kernels.gated_activation(gate_up), layer.down)
        self._gate.wait(len(self._layers))
        hidden = kernels.add_rms_norm(added, residual, self._norm, epsilon)
        return kernels.linear(hidden, self._head)

    def _scale(self, index: int, layer: Layer) -> None:
        """Have a layer's keys and values scaled by its weights, once."""
        scales = self._kernels.kv_scales
        if scales is not None and not self._scaled[index]:
            norm = layer.head_norms[1] if layer.head_norms is not None else None
            found = kv_scales(self._spec, layer.attention_norm, layer.qkv, layer.qkv_bias, norm)
            scales[index].copy_(found)
            self._scaled[index] = True
