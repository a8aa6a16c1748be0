"""A model's tokenizer, as the gateway uses it, and the bounded cache of those in use.

A `ModelTokenizer` is shared by all requests of a model and never changes after loading. Loading and
long texts run outside the event loop; short texts are encoded at once, which is cheaper than a
thread. Invariant: a model is loaded once however many requests wait for it, and at most
`tokenizers_max` stay in memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from pathlib import Path

from tokenizers import Tokenizer

from daemon.gateway.errors import TokenizerUnusable
from daemon.gateway.tokens.detokenise import (
    ByteDetokenizer,
    BytePieces,
    Detokenizer,
    WindowDetokenizer,
)
from daemon.gateway.tokens.template import ChatTemplate, read_template
from engine.link.routes import Route

INLINE_CHARACTERS_MAX = 4096
"""Longest text that is encoded on the event loop, about a millisecond's worth."""

log = logging.getLogger(__name__)


class ModelTokenizer:
    """Encodes, decodes and renders for one model."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, added in added.items() if added.special)
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        byte_level = decoder.get("type") == "ByteLevel"
        self._pieces = BytePieces(tokenizer, self._special) if byte_level else None
        self.template = template
        self.vocabulary: int = tokenizer.get_vocab_size()

    async def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The token ids of a text."""
        if len(text) <= INLINE_CHARACTERS_MAX:
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            encoding = await self._tokenizer.async_encode(
                text, add_special_tokens=add_special_tokens
            )
        return tuple(encoding.ids)

    def detokenizer(self) -> Detokenizer:
        """A decoder for one sequence."""
        if self._pieces is not None:
            return ByteDetokenizer(self._pieces)
        return WindowDetokenizer(self._tokenizer, self._special)

    def spelling(self, token: int) -> bytes:
        """A token's own bytes, as log probabilities show them."""
        if self._pieces is not None:
            return self._pieces.spelling(token)
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode()


def load_tokenizer(directory: Path) -> ModelTokenizer:
    """Read a checkpoint's tokenizer.json and chat template. Raises TokenizerUnusable."""
    file = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise TokenizerUnusable(f"cannot read the tokenizer {file}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return ModelTokenizer(tokenizer, read_template(directory))


class TokenizerCache:
    """Tokenizers by model key and directory, the least recently used going first."""

    def __init__(self, tokenizers_max: int) -> None:
        self._tokenizers_max = tokenizers_max
        self._loads: OrderedDict[tuple[str, str], asyncio.Task[ModelTokenizer]] = OrderedDict()
        self._offered: set[tuple[str, str]] = set()

    async def get(self, route: Route) -> ModelTokenizer:
        """The tokenizer of a route's model. Raises TokenizerUnusable, and tries anew next time."""
        key = (route.model, route.directory)
        load = self._loads.get(key)
        if load is None:
            load = asyncio.create_task(asyncio.to_thread(load_tokenizer, Path(route.directory)))
            self._loads[key] = load
            if len(self._loads) > self._tokenizers_max:
                self._loads.popitem(last=False)
        self._loads.move_to_end(key)
        if load.done() and load.exception() is None:
            return load.result()
        try:
            return await asyncio.shield(load)
        except TokenizerUnusable:
            if self._loads.get(key) is load:
                del self._loads[key]
            raise

    async def preload(self, routes: tuple[Route, ...]) -> None:
        """Load what will be asked for, one after another, so that a first request need not wait.

        Each model is tried once for as long as it is among the routes.
        """
        fresh = [route for route in routes if (route.model, route.directory) not in self._offered]
        self._offered = {(route.model, route.directory) for route in routes}
        for route in fresh[: self._tokenizers_max]:
            try:
                await self.get(route)
            except TokenizerUnusable as error:
                log.warning("%s: %s", route.model, error)
