"""Incremental decoding: token ids in, text out, each character as soon as it is complete.

Two ways, one contract: the concatenation of all pieces equals the tokenizer's own decoding of the
whole sequence, except that an incomplete character at the very end is left out. Byte-level
vocabularies (Llama 3, Qwen, Mistral's Tekken) map each token to bytes, which an incremental UTF-8
decoder turns into text in constant time; all others decode a short window of recent tokens.
Special tokens give no text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from tokenizers import Tokenizer

WINDOW_TOKENS_MAX = 32
"""Tokens that may wait for a character to become complete before they are given out as they are."""
REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Decodes one sequence."""

    def step(self, tokens: Iterable[int]) -> str:
        """The text that these further tokens complete."""


def byte_level_alphabet() -> dict[str, int]:
    """The bytes behind the printable characters in which byte-level vocabularies are written.

    Printable Latin-1 stands for itself; the other 68 bytes follow from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return alphabet


class BytePieces(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, worked out when first asked for."""

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = special
        self._alphabet = byte_level_alphabet()

    def __missing__(self, token: int) -> bytes:
        piece = b"" if token in self._special else self.spelling(token)
        self[token] = piece
        return piece

    def spelling(self, token: int) -> bytes:
        """A token's bytes, special tokens included; none for an id outside the vocabulary."""
        text: str = self._tokenizer.id_to_token(token) or ""
        try:
            return bytes([self._alphabet[character] for character in text])
        except KeyError:
            # An added token is written as itself, as the tokenizer's own decoder takes it.
            return text.encode()


class ByteDetokenizer:
    """Decodes one sequence of a byte-level vocabulary."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def step(self, tokens: Iterable[int]) -> str:
        pieces = self._pieces
        return self._decode(b"".join([pieces[token] for token in tokens]))


class WindowDetokenizer:
    """Decodes one sequence of any vocabulary, by decoding the last few tokens twice.

    The window begins where the text before last ended, so that whatever the tokenizer does at the
    beginning of a text (dropping a space, for one) is the same both times and cancels out.
    """

    __slots__ = ("_read", "_special", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._window: list[int] = []
        self._read = 0  # how many tokens of the window have been given out

    def step(self, tokens: Iterable[int]) -> str:
        return "".join([self._one(token) for token in tokens if token not in self._special])

    def _one(self, token: int) -> str:
        self._window.append(token)
        before: str = self._tokenizer.decode(self._window[: self._read])
        text: str = self._tokenizer.decode(self._window)
        waiting = len(self._window) - self._read
        if text.endswith(REPLACEMENT) and waiting < WINDOW_TOKENS_MAX:
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return text[len(before) :]
