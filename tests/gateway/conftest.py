"""Model directories made on the spot, and gateways on a stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engine.link.routes import Disposition
from engine.link.tokens import Submit
from tests.support.gateway_stage import GatewayStage
from tests.support.scripted_worker import Script

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + message['role']) }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY = 300
CORPUS = ["the quick brown fox jumps over the lazy dog and the answer is forty two"] * 4


def make_model(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    """A model directory with a byte-level tokenizer of VOCABULARY tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model's directory."""
    return make_model(tmp_path_factory.mktemp("models") / "fox" / "1")


@pytest.fixture(scope="session")
def tokenizer(model_directory: Path) -> Tokenizer:
    """The same model's tokenizer, read by the library alone."""
    return Tokenizer.from_file(str(model_directory / "tokenizer.json"))


@pytest.fixture(scope="session")
def ids(tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """Text to token ids without special tokens."""
    return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)


class Scripts:
    """What the stage's workers answer; a test sets `answer`."""

    def __init__(self) -> None:
        self.answer: Callable[[Submit], Script] = lambda submit: Script()

    def __call__(self, submit: Submit) -> Script:
        return self.answer(submit)


@pytest.fixture(scope="module")
def module_stage(
    tmp_path_factory: pytest.TempPathFactory, model_directory: Path
) -> Iterator[GatewayStage]:
    """A gateway with two models on one worker, shared by a file's tests."""
    with GatewayStage(
        tmp_path_factory.mktemp("runtime"), body_bytes_max=100_000, body_timeout_s=1.0
    ) as stage:
        stage.worker("gpu0", Scripts())
        stage.route("fox@1", model_directory)
        stage.route("owl@2", model_directory)
        stage.send_table()
        stage.connected()
        yield stage


@pytest.fixture
def stage(module_stage: GatewayStage, model_directory: Path) -> GatewayStage:
    """The shared gateway, as it was in the beginning."""
    stage = module_stage
    if stage.daemon.peer is None or stage.daemon.peer.closed:
        stage.do(stage.daemon.connect())
    if "gpu0" not in stage.workers:
        stage.worker("gpu0", Scripts())
    stage.workers["gpu0"].script = Scripts()
    stage.routes.clear()
    stage.route("fox@1", model_directory)
    stage.route("owl@2", model_directory)
    stage.send_table(hold_timeout_s=30.0, held_requests_max=64)
    stage.connected()
    stage.daemon.demands.clear()
    stage.workers["gpu0"].submits.clear()
    stage.workers["gpu0"].cancels.clear()
    return stage


@pytest.fixture
def say(stage: GatewayStage, ids: Callable[[str], tuple[int, ...]]) -> Callable[..., None]:
    """Let the worker answer every request with a text."""

    def set_answer(text: str, **script: object) -> None:
        tokens = ids(text)
        stage.workers["gpu0"].script.answer = lambda _: Script(tokens=tokens, **script)

    return set_answer


def hold(stage: GatewayStage, model: str, directory: Path) -> None:
    """Put a model's route on hold."""
    stage.route(model, directory, disposition=Disposition.HOLD, state="STANDBY")
    stage.send_table()


def serve(stage: GatewayStage, model: str, directory: Path) -> None:
    """Open a model's route."""
    stage.route(model, directory)
    stage.send_table()


CHAT = {"model": "fox", "messages": [{"role": "user", "content": "hello"}]}
