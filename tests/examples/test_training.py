"""The programs that make the models: the corpus, the conversations, and a short training twice."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from examples import checkpoint, conversation, corpus, train
from examples.corpus import Document, Passage

ROOT = Path(__file__).parents[2]
PASSAGE = Passage("open_door", "def open_door(handle):\n    return handle.turn(degrees=90)")


def short_training(output: Path) -> subprocess.Popen[str]:
    options = ["--steps", "2", "--documents", "8", "--seed", "7", "--output", str(output)]
    return subprocess.Popen(
        [sys.executable, "-m", "examples.train", "--model", "code", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "again"]
    runs = [short_training(folder) for folder in folders]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    first, again = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders
    )
    assert first == again
    assert len(first["model.safetensors"]) > 6_000_000
    assert json.loads(first["training.json"])["command"].endswith("--steps 2 --seed 7")
    assert "step     2 of 2: loss" in said[0]
    assert f"{corpus.STANDARD_LIBRARY}" in said[0]


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_the_corpus_is_ordered_ample_and_partly_held_out(kind: str) -> None:
    found = corpus.documents(kind)
    names = [document.name for document in found]
    held_out = [document for document in found if document.held_out]
    passages = [passage for document in found for passage in document.passages]
    assert names == sorted(set(names))
    assert sum(len(document.text) for document in found) > 1_000_000
    assert 0 < len(held_out) < len(found) // 10
    assert len(passages) > 1000
    assert max(len(passage.text) for passage in passages) <= corpus.PASSAGE_LIMIT_CHARS
    assert not any("\f" in document.text or "\r" in document.text for document in found)


def test_a_corpus_that_is_not_there_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpus, "LICENCES", tmp_path / "licences")
    monkeypatch.setattr(corpus, "STANDARD_LIBRARY", tmp_path / "library")
    with pytest.raises(corpus.CorpusError, match="found no text for 'prose' under"):
        corpus.documents("prose")


def test_prose_comes_from_docstrings_without_console_sessions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = "Say what a thing is, at such length that it is worth learning from. " * 3
    source = f'"""{long}"""\ndef shown():\n    """{long}\n\n    >>> 1\n    """\ndef bare(): pass\n'
    (tmp_path / "thing.py").write_text(source)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(source)
    monkeypatch.setattr(corpus, "LICENCES", tmp_path / "licences")
    monkeypatch.setattr(corpus, "STANDARD_LIBRARY", tmp_path)
    (document,) = corpus.documents("prose")
    assert document.name == "docstrings/thing"
    assert document.passages == (Passage("thing", long.strip()),)


def test_the_fingerprint_tells_corpora_apart() -> None:
    one = Document("a", "text", ())
    assert corpus.fingerprint((one,)) == corpus.fingerprint((Document("a", "text", ()),))
    assert corpus.fingerprint((one,)) != corpus.fingerprint((Document("at", "ext", ()),))


def test_training_conversations_are_what_the_template_renders() -> None:
    turns = [("system", "Be kind."), ("user", " What? "), ("assistant", "That."), ("user", "Why?")]
    template = ImmutableSandboxedEnvironment().from_string(conversation.CHAT_TEMPLATE)
    rendered = template.render(
        messages=[{"role": role, "content": text} for role, text in turns],
        add_generation_prompt=True,
        bos_token=conversation.BEGIN,
        eos_token=conversation.END,
    )
    assert conversation.transcript(turns, answering=True) == rendered


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_requests_vary_and_stay_on_their_subject(kind: str) -> None:
    choose = random.Random(5)
    asked = {conversation.request(kind, PASSAGE, choose) for _ in range(200)}
    names = [PASSAGE.subject, "def", *conversation.WORD.findall(PASSAGE.text)]
    astray = {text for text in asked if not any(name in text for name in names)}
    assert len(asked) > 30
    assert astray == set(conversation.GREETINGS)


def test_training_texts_hold_each_document_per_repeat_and_each_passage_per_round() -> None:
    documents = (Document("a", "first", (PASSAGE, PASSAGE)), Document("b", "second", (), repeats=2))
    texts = conversation.training_texts("code", documents, random.Random(1), chat_rounds=3)
    plain = [text for text in texts if conversation.USER not in text]
    assert sorted(plain) == ["<|begin|>first<|end|>", *["<|begin|>second<|end|>"] * 2]
    assert len(texts) == 3 + 3 * 2
    assert all(text.startswith("<|begin|>") and text.endswith("<|end|>") for text in texts)


def test_windows_come_from_the_stream_and_half_begin_a_text() -> None:
    stream = train.Stream(torch.arange(10_000), torch.tensor([0, 70, 4000, 9_990]))
    windows = stream.windows(2000, 64, torch.Generator().manual_seed(3))
    assert windows.shape == (2000, 65)
    assert torch.equal(windows - windows[:, :1], torch.arange(65).expand(2000, 65))
    at_a_start = torch.isin(windows[:, 0], torch.tensor([0, 70, 4000, 10_000 - 65]))
    assert 0.4 < at_a_start.float().mean() < 0.6


def test_a_stream_joins_texts_by_their_own_markers() -> None:
    tokenizer = checkpoint.train_tokenizer("code", ["aaaa bbbb"] * 4)
    texts = ["<|begin|>aaaa<|end|>", "<|begin|>bbbb bbbb<|end|>"]
    stream = train.encode(tokenizer, texts)
    assert tokenizer.decode(stream.tokens.tolist(), skip_special_tokens=False) == "".join(texts)
    starts = (stream.tokens == checkpoint.BEGIN_ID).nonzero().flatten()
    assert torch.equal(stream.starts, starts)


def test_the_schedule_climbs_then_falls_and_ends_on_long_windows() -> None:
    shares = [train.learning_rate_share(step, 1000) for step in range(1000)]
    peak = shares.index(max(shares))
    assert math.isclose(shares[peak], 1.0)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert shares[-1] < 2 * train.FINAL_SHARE
    shapes = [train.window_shape(step, 1000) for step in range(1000)]
    assert shapes == sorted(shapes, key=lambda shape: shape[1])
    assert shapes[0][0] * shapes[0][1] == train.SHORT_STEP_TOKENS
    assert shapes[-1] == (1, checkpoint.CONTEXT_TOKENS)


def test_each_parameter_has_exactly_one_optimizer() -> None:
    for kind in ("prose", "code"):
        model = checkpoint.build_model(kind)
        held = [
            weight
            for optimizer in train.optimizers(model)
            for group in optimizer.param_groups
            for weight in group["params"]
        ]
        assert len(held) == len({id(weight) for weight in held})
        assert {id(weight) for weight in held} == {id(weight) for weight in model.parameters()}


def test_a_folder_over_the_limit_is_refused_with_the_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkpoint, "FOLDER_LIMIT_BYTES", 1000)
    tokenizer = checkpoint.train_tokenizer("prose", ["some text"])
    with pytest.raises(checkpoint.CheckpointTooLarge, match="of at most 1000: make the model"):
        checkpoint.save(tmp_path, checkpoint.build_model("prose"), tokenizer, {"steps": 0})
