"""Loading tokenizers: once, bounded, and anew after a failure."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import uvloop
from tokenizers import Tokenizer

from daemon.gateway.errors import TokenizerUnusable
from daemon.gateway.tokens import tokenizer as module
from daemon.gateway.tokens.tokenizer import ModelTokenizer, TokenizerCache, load_tokenizer
from engine.link.routes import Disposition, Route
from tests.gateway.conftest import VOCABULARY, make_model


def route(model: str, directory: Path) -> Route:
    name, version = model.split("@")
    return Route(model, name, int(version), True, str(directory), 64, "ACTIVE", Disposition.SERVE)


def run(coroutine: object) -> object:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)  # type: ignore[arg-type]


def test_long_texts_take_another_way_to_the_same_tokens(
    model_directory: Path, tokenizer: Tokenizer
) -> None:
    text = "the quick brown fox, " * 1000
    assert len(text) > module.INLINE_CHARACTERS_MAX

    async def encode() -> tuple[int, ...]:
        return await load_tokenizer(model_directory).encode(text, add_special_tokens=True)

    assert run(encode()) == tuple(tokenizer.encode(text).ids)


def test_many_requests_cause_one_load(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []

    def load(directory: Path) -> ModelTokenizer:
        loads.append(directory)
        return load_tokenizer(directory)

    monkeypatch.setattr(module, "load_tokenizer", load)

    async def ask() -> list[ModelTokenizer]:
        cache = TokenizerCache(4)
        return await asyncio.gather(*(cache.get(route("a@1", model_directory)) for _ in range(9)))

    answers = run(ask())
    assert len(loads) == 1
    assert len(set(map(id, answers))) == 1  # type: ignore[call-overload]


def test_the_least_recently_used_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = {name: make_model(tmp_path / name) for name in "abc"}
    loads: list[str] = []

    def load(directory: Path) -> ModelTokenizer:
        loads.append(directory.name)
        return load_tokenizer(directory)

    monkeypatch.setattr(module, "load_tokenizer", load)

    async def ask() -> None:
        cache = TokenizerCache(2)
        for name in "abacab":
            await cache.get(route(f"{name}@1", directories[name]))

    run(ask())
    assert loads == ["a", "b", "c", "b"]


def test_a_failure_is_tried_anew(tmp_path: Path) -> None:
    async def ask() -> int:
        cache = TokenizerCache(2)
        with pytest.raises(TokenizerUnusable, match=r"tokenizer\.json"):
            await cache.get(route("a@1", tmp_path))
        await cache.preload((route("a@1", tmp_path),))  # logs, does not raise
        make_model(tmp_path)
        return (await cache.get(route("a@1", tmp_path))).vocabulary

    assert run(ask()) == VOCABULARY
