"""The models file: what people write to say which models a node is to serve, and how well.

It owns the form of the file and what an entry means. It knows no GPU. The invariant: whatever is
accepted has one meaning, and whatever is refused names its line, the reason and what to change.

    version: 1
    models:
      - name: chat
        weights: 16GiB             # or `model: chat@2`, of which the node knows weights and KV
        kv: 8GiB                   # or requests x context_tokens of a model that the node knows
        requests: 16               # at once
        tokens_per_s: 400          # of all of them together
        ms_per_token: 40           # at most
        alone_ms: 11               # measured, with a whole GPU to itself
        tenant: team-a
        isolation: process         # from other tenants: hardware, process or none
        value: 5                   # which to keep when not all fit
        copies: 2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from partitioner.errors import DocumentError
from partitioner.layout_file import Owner, Size, parse_size
from partitioner.packing.values import Isolation, ModelNeed
from partitioner.strict_yaml import KeyPath, StrictModel, parse_located

MODELS_MAX = 256
COPIES_MAX = 64
WALLS = {
    "none": Isolation.NONE,
    "process": Isolation.PROCESS,
    "hardware": Isolation.HARDWARE,
}


@dataclass(frozen=True)
class KnownModel:
    """What the node knows of a model."""

    weights_bytes: int
    kv_bytes_per_token: int
    context_tokens: int


Find = Callable[[str], KnownModel]
"""Finds a model of the node by name; raises LookupError with words for the reader."""


class _Entry(StrictModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,79}$")] | None = None
    model: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    weights: Size | None = None
    kv: Size | None = None
    requests: Annotated[int, Field(ge=1, le=4096)] = 1
    context_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    tokens_per_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    ms_per_token: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    alone_ms: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    tenant: Owner | None = None
    isolation: Literal["hardware", "process", "none"] = "process"
    value: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    copies: Annotated[int, Field(ge=1, le=COPIES_MAX)] = 1

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        if (self.model is None) == (self.weights is None):
            raise ValueError("say either model, one that the node knows, or weights")
        if self.name is None and self.model is None:
            raise ValueError("give it a name")
        if self.weights is not None and self.kv is None:
            raise ValueError("say kv: only for a model that the node knows it can be worked out")
        if self.kv is not None and self.context_tokens is not None:
            raise ValueError("kv and context_tokens say the same: take one of them away")
        return self


class _ModelsFile(StrictModel):
    version: Literal[1]
    models: Annotated[tuple[_Entry, ...], Field(min_length=1, max_length=MODELS_MAX)]


def parse_models(text: str, source: str, find: Find) -> tuple[ModelNeed, ...]:
    """Read a models file; raises `DocumentError` with the line that must change."""
    file, lines = parse_located(_ModelsFile, text, source)
    needs: list[ModelNeed] = []
    named: dict[str, int] = {}
    for index, entry in enumerate(file.models):
        path: KeyPath = ("models", index)
        name = entry.name or entry.model or ""
        if name in named:
            problem = f"the name {name!r} is line {named[name]}'s already: give this one another"
            raise DocumentError(source, lines[path], problem)
        named[name] = lines[path]
        try:
            weights_bytes, kv_bytes = _sizes(entry, find)
        except LookupError as error:
            problem = str(error.args[0])
            raise DocumentError(source, lines.get((*path, "model"), lines[path]), problem) from None
        for copy in range(entry.copies):
            called = name if entry.copies == 1 else f"{name}#{copy + 1}"
            needs.append(_need(entry, called, weights_bytes, kv_bytes, lines[path]))
    if len(needs) > MODELS_MAX:
        problem = f"{len(needs)} models with all copies; at most {MODELS_MAX} are placed at once"
        raise DocumentError(source, lines[("models",)], problem)
    return tuple(needs)


def _sizes(entry: _Entry, find: Find) -> tuple[int, int]:
    kv_bytes = parse_size(entry.kv) if entry.kv is not None else 0
    if entry.model is None:
        assert entry.weights is not None
        return parse_size(entry.weights), kv_bytes
    known = find(entry.model)
    if entry.kv is None:
        tokens = min(entry.context_tokens or known.context_tokens, known.context_tokens)
        kv_bytes = entry.requests * tokens * known.kv_bytes_per_token
    return known.weights_bytes, kv_bytes


def _need(entry: _Entry, name: str, weights_bytes: int, kv_bytes: int, line: int) -> ModelNeed:
    return ModelNeed(
        name=name,
        weights_bytes=weights_bytes,
        kv_bytes=kv_bytes,
        tenant=entry.tenant or "",
        isolation=WALLS[entry.isolation],
        value=entry.value,
        requests=entry.requests,
        tokens_per_s=entry.tokens_per_s or 0.0,
        ms_per_token=entry.ms_per_token or 0.0,
        alone_ms=entry.alone_ms or 0.0,
        line=line,
    )
