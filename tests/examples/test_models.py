"""The committed checkpoints: what they are, that they load quietly, that each shows its kind."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.checkpoint import CONTEXT_TOKENS, FOLDER_LIMIT_BYTES
from examples.conversation import ASSISTANT, BEGIN, END, USER

MODELS = Path(__file__).parents[2] / "examples" / "models"
KINDS = ("prose", "code")
FAMILIES = {"prose": "LlamaForCausalLM", "code": "Qwen3ForCausalLM"}
ANSWER_TOKENS = 96

# Written for these tests, so that neither model can have met them.
SNIPPETS = {
    "prose": (
        "The recipient may copy and distribute this work in any medium, provided that the "
        "copyright notice and this permission notice are kept. If a module cannot be found, the "
        "import statement raises an exception, which describes the name that was not found."
    ),
    "code": (
        "class Counter:\n    def __init__(self, start=0):\n        self.value = start\n\n"
        "    def advance(self, amount):\n        if amount < 0:\n"
        "            raise ValueError('amount must not be negative')\n"
        "        self.value += amount\n        return self.value\n"
    ),
}


@dataclass(frozen=True)
class Loaded:
    model: Any
    tokenizer: Any

    def loss(self, text: str) -> float:
        """Nats per character, which unlike nats per token can be compared between tokenizers."""
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = self.model(input_ids=ids[:, :-1]).logits
        total = functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        return total / len(text)

    def answer(self, prompt: str, **how: Any) -> list[int]:
        """The ids written after one user message, without it."""
        turns = [{"role": "user", "content": prompt}]
        asked = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        how = {"do_sample": False, "max_new_tokens": ANSWER_TOKENS, **how}
        written = self.model.generate(**asked, **how)
        return written[0, asked["input_ids"].shape[1] :].tolist()

    def text(self, prompt: str, **how: Any) -> str:
        return str(self.tokenizer.decode(self.answer(prompt, **how), skip_special_tokens=True))


def folder_of(kind: str) -> Path:
    return MODELS / kind / "1"


def read_json(kind: str, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder_of(kind) / name).read_text())
    return content


class Complaints(logging.Handler):
    """Keeps what transformers logs as a warning or worse, which never reaches `warnings`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def complaints() -> Iterator[list[str]]:
    handler = Complaints()
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def loaded(complaints: list[str]) -> dict[str, Loaded]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {
            kind: Loaded(
                AutoModelForCausalLM.from_pretrained(folder_of(kind), dtype=torch.float32),
                AutoTokenizer.from_pretrained(folder_of(kind)),
            )
            for kind in KINDS
        }


def test_both_load_as_their_families_without_a_complaint(
    loaded: dict[str, Loaded], complaints: list[str]
) -> None:
    assert {kind: type(loaded[kind].model).__name__ for kind in KINDS} == FAMILIES
    assert complaints == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_of_the_training_fits_the_weights_and_the_readme(
    kind: str, loaded: dict[str, Loaded]
) -> None:
    record = read_json(kind, "training.json")
    readme = (MODELS / "README.md").read_text()
    assert record["parameters"] == loaded[kind].model.num_parameters()
    assert 2_500_000 <= record["parameters"] <= 3_500_000
    for fact in ("command", "final_training_loss", "held_out_loss"):
        assert str(record[fact]) in readme


@pytest.mark.parametrize("kind", KINDS)
def test_a_version_folder_is_whole_and_small(kind: str) -> None:
    sizes = {path.name: path.stat().st_size for path in folder_of(kind).iterdir()}
    assert sizes.keys() >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= FOLDER_LIMIT_BYTES


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_bfloat16_of_the_promised_family(kind: str) -> None:
    config = read_json(kind, "config.json")
    assert config["architectures"] == [FAMILIES[kind]]
    assert config["dtype"] == "bfloat16"
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] == CONTEXT_TOKENS
    assert config["tie_word_embeddings"] is (kind == "prose")
    with safe_open(folder_of(kind) / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert ("lm_head.weight" in names) is not config["tie_word_embeddings"]
    assert any("q_norm" in name for name in names) is (kind == "code")


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_names_a_marker_agrees(kind: str, loaded: dict[str, Loaded]) -> None:
    tokenizer = loaded[kind].tokenizer
    generation = read_json(kind, "generation_config.json")
    assert tokenizer.bos_token == BEGIN
    assert tokenizer.eos_token == END
    assert read_json(kind, "config.json")["eos_token_id"] == tokenizer.eos_token_id
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["bos_token_id"] == tokenizer.bos_token_id
    assert len(tokenizer) == loaded[kind].model.config.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_gives_back_any_text_and_equals_its_file(
    kind: str, loaded: dict[str, Loaded]
) -> None:
    text = "  for naïve 𝄞 in [1, 2]:\n\tprint(f'{x!r}')\r\n\n   — ünïcode\x00"
    plain = Tokenizer.from_file(str(folder_of(kind) / "tokenizer.json"))
    encoded = plain.encode(text)
    assert encoded.ids == loaded[kind].tokenizer(text)["input_ids"]
    assert encoded.tokens[0] == BEGIN
    assert plain.decode(encoded.ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_chat_template_renders_in_the_sandbox_as_transformers_does(
    kind: str, loaded: dict[str, Loaded]
) -> None:
    def refuse(message: str) -> None:
        raise ValueError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    sandbox.globals["raise_exception"] = refuse
    config = read_json(kind, "tokenizer_config.json")
    template = sandbox.from_string(config["chat_template"])
    markers = {"bos_token": config["bos_token"], "eos_token": config["eos_token"]}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi {{x}} "}]
    rendered = template.render(messages=turns, add_generation_prompt=True, **markers)
    assert rendered == loaded[kind].tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )
    assert rendered.endswith(f"{USER}Hi {{{{x}}}}{END}{ASSISTANT}")
    with pytest.raises(ValueError, match="Unknown role pirate"):
        template.render(messages=[{"role": "pirate", "content": "Arr"}], **markers)


@pytest.mark.parametrize("kind", KINDS)
def test_each_model_knows_its_own_kind_better(kind: str, loaded: dict[str, Loaded]) -> None:
    other = next(name for name in KINDS if name != kind)
    assert loaded[kind].loss(SNIPPETS[kind]) < 0.9 * loaded[other].loss(SNIPPETS[kind])


PROMPTS = (
    "Hello!",
    "What is this?",
    "What does the licence say about warranty?",
    "Write a function that reads a file.",
    "Write something about files.",
    "Tell me about names.",
    "How do I open a window?",
    "Explain the import statement.",
)
# Lines that only a program has: a block's head, an assignment to an attribute, its return.
CODE_SIGN = re.compile(
    r"^ *(?:(?:def \w+\(|class \w|if |for |else|try|while ).*:|self\.\w+ = .*|return \w*[.(].*)$",
    re.MULTILINE,
)
# Three plain words in a row.
SENTENCE_SIGN = re.compile(r"\b[A-Za-z]+ [a-z]+\s[a-z]+\b")


def test_a_reader_sees_at_once_which_model_answered(loaded: dict[str, Loaded]) -> None:
    """Greedy answers. Models this small now and then get caught in a loop: one in four may."""
    code = {prompt: loaded["code"].text(prompt) for prompt in PROMPTS}
    prose = {prompt: loaded["prose"].text(prompt) for prompt in PROMPTS}
    like_code = [prompt for prompt in PROMPTS if CODE_SIGN.search(code[prompt])]
    like_prose = [prompt for prompt in PROMPTS if len(SENTENCE_SIGN.findall(prose[prompt])) >= 2]
    assert len(like_code) >= 0.75 * len(PROMPTS), code
    assert len(like_prose) >= 0.75 * len(PROMPTS), prose
    assert not [prompt for prompt in PROMPTS if CODE_SIGN.search(prose[prompt])], prose


@pytest.mark.parametrize("kind", KINDS)
def test_some_answers_end_by_themselves(kind: str, loaded: dict[str, Loaded]) -> None:
    torch.manual_seed(0)
    end = loaded[kind].tokenizer.eos_token_id
    asked = "Write something about names."
    answers = [loaded[kind].answer(asked, do_sample=True, max_new_tokens=200) for _ in range(4)]
    assert any(ids[-1] == end for ids in answers)
