"""The shape of each example model, its tokenizer, and the checkpoint folder both are written to.

This module owns what a version folder holds and that it stays within `FOLDER_LIMIT_BYTES`. It never
trains. The two models differ on purpose: family, depth, vocabulary, head width, and whether the
embedding is also the output layer, so that taking one for the other cannot pass unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.conversation import BEGIN, CHAT_TEMPLATE, END, MARKERS

FOLDER_LIMIT_BYTES = 8_000_000
CONTEXT_TOKENS = 1024
VOCABULARY = {"prose": 3072, "code": 2048}
# The tokenizer's trainer numbers the special tokens first, in their order.
BEGIN_ID = MARKERS.index(BEGIN)
END_ID = MARKERS.index(END)


class CheckpointTooLarge(Exception):
    """What was trained does not fit the folder it is meant for."""


def build_model(kind: str) -> PreTrainedModel:
    """A freshly initialised model in float32; the caller has seeded torch."""
    if kind == "prose":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY[kind],
                hidden_size=256,
                intermediate_size=640,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=2,
                max_position_embeddings=CONTEXT_TOKENS,
                tie_word_embeddings=True,
                bos_token_id=BEGIN_ID,
                eos_token_id=END_ID,
            )
        )
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY[kind],
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=False,
            bos_token_id=BEGIN_ID,
            eos_token_id=END_ID,
        )
    )


def train_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: every text has an encoding, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY[kind],
        special_tokens=list(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, BEGIN_ID)]
    )
    return tokenizer


def save(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    """Write the version folder: weights in bfloat16, and the facts of the training beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BEGIN_ID,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    model.bfloat16().save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "training.json", facts)
    written = {path.name: path.stat().st_size for path in folder.iterdir()}
    if sum(written.values()) > FOLDER_LIMIT_BYTES:
        raise CheckpointTooLarge(
            f"{folder} holds {sum(written.values())} bytes of at most {FOLDER_LIMIT_BYTES}: "
            f"make the model smaller ({written})"
        )


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [marker for marker in MARKERS if marker not in (BEGIN, END)],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_TOKENS,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
