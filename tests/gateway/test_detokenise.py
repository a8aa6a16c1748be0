"""Incremental decoding against the tokenizer's own decoding of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from daemon.gateway.tokens.detokenise import REPLACEMENT, byte_level_alphabet
from daemon.gateway.tokens.tokenizer import ModelTokenizer, load_tokenizer
from tests.gateway.conftest import VOCABULARY

EXAMPLES = sorted(Path(__file__).resolve().parents[2].glob("examples/models/*/1"))
TEXTS = [
    "plain words, and the answer is 42.",
    "wörld — “quotes” … ﬁne",
    "你好，世界。 日本語テキスト",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 flags",
    "  leading\n\n\ttabs  and   runs   ",
    "a\u0301 combining, \u200d joiner, \u00a0 space",
]


def pieces(tokenizer: ModelTokenizer, tokens: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [detokenizer.step((token,)) for token in tokens]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_never_show_half_a_character(
    text: str, tokenizer: Tokenizer, model_directory: Path
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    shown = pieces(load_tokenizer(model_directory), tokens)
    assert "".join(shown) == tokenizer.decode(tokens) == text
    assert not any(REPLACEMENT in piece for piece in shown)


@pytest.mark.parametrize("directory", EXAMPLES, ids=lambda path: path.parent.name)
def test_example_models_decode_as_the_library_does(directory: Path) -> None:
    library = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ours = load_tokenizer(directory)
    for text in TEXTS:
        tokens = library.encode(text).ids
        assert "".join(pieces(ours, tokens)) == library.decode(tokens) == text


def test_special_tokens_give_no_text(tokenizer: Tokenizer, model_directory: Path) -> None:
    tokens = [0, *tokenizer.encode("fox", add_special_tokens=False).ids, 1, 4]
    assert "".join(pieces(load_tokenizer(model_directory), tokens)) == "fox"


def test_an_unfinished_character_at_the_end_is_left_out(
    ids: Callable[[str], tuple[int, ...]], model_directory: Path
) -> None:
    tokens = list(ids("a🙂"))
    assert "".join(pieces(load_tokenizer(model_directory), tokens[:-1])) == "a"


@settings(max_examples=150, deadline=None)
@given(data=st.lists(st.integers(5, VOCABULARY - 1), max_size=60))
def test_any_tokens_decode_as_the_library_does_up_to_the_last_character(
    data: list[int], tokenizer: Tokenizer, model_directory: Path
) -> None:
    whole = tokenizer.decode(data)
    ours = "".join(pieces(_cached(model_directory), data))
    # Only an unfinished character at the very end may lack: at most three bytes, shown as marks.
    assert whole.startswith(ours)
    assert whole[len(ours) :] == REPLACEMENT * (len(whole) - len(ours))
    assert len(whole) - len(ours) <= 3


_LOADED: dict[Path, ModelTokenizer] = {}


def _cached(directory: Path) -> ModelTokenizer:
    if directory not in _LOADED:
        _LOADED[directory] = load_tokenizer(directory)
    return _LOADED[directory]


def test_alphabet_is_that_of_the_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))


def sentencepiece() -> Tokenizer:
    """A vocabulary written the other way: spaces as a mark, rare bytes as tokens of their own."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁the", "▁fox", "fox", "▁", "▁a", "a", "b", "é", "▁你", "."]
    tokenizer = Tokenizer(
        models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@pytest.mark.parametrize(
    "text", ["the fox.", "a b  a", "fox é 你 🙂 the", "好 🙂🙂 fox", " the", "🙂"]
)
def test_other_vocabularies_go_through_a_window(text: str) -> None:
    library = sentencepiece()
    tokens = library.encode(text).ids
    shown = pieces(ModelTokenizer(library, None), tokens)
    assert "".join(shown) == library.decode(tokens) == text
    assert not any(REPLACEMENT in piece for piece in shown)


def test_a_window_is_bounded_when_bytes_never_become_a_character() -> None:
    library = sentencepiece()
    stray = library.token_to_id("<0xE4>")
    shown = pieces(ModelTokenizer(library, None), [stray] * 100)
    assert sum(map(len, shown[:50])) > 0


def test_spelling_shows_special_tokens_and_single_bytes(
    ids: Callable[[str], tuple[int, ...]], model_directory: Path
) -> None:
    ours = load_tokenizer(model_directory)
    assert ours.spelling(1) == b"<|end|>"
    assert b"".join(map(ours.spelling, ids("🙂"))) == "🙂".encode()
    assert ours.spelling(100_000) == b""
