"""The models file: what its entries mean, and every refusal with its line."""

from __future__ import annotations

import pytest

from partitioner.errors import DocumentError
from partitioner.packing.models_file import MODELS_MAX, KnownModel, parse_models
from partitioner.packing.values import Isolation, ModelNeed
from tests.partitioner.packing.node import GIB

KIB = 1 << 10


def find(name: str) -> KnownModel:
    if name != "chat@2":
        raise LookupError(f"there is no model {name!r}; the node has chat@2")
    return KnownModel(weights_bytes=8 * GIB, kv_bytes_per_token=128 * KIB, context_tokens=8192)


def read(*lines: str) -> tuple[ModelNeed, ...]:
    text = "version: 1\nmodels:\n" + "".join(f"  {line}\n" for line in lines)
    return parse_models(text, "models.yaml", find)


def test_an_entry_in_full() -> None:
    (model,) = read(
        "- name: chat",
        "  weights: 16GiB",
        "  kv: 8GiB",
        "  requests: 16",
        "  tokens_per_s: 400",
        "  ms_per_token: 40",
        "  alone_ms: 11.5",
        "  tenant: team-a",
        "  isolation: hardware",
        "  value: 5",
    )
    assert model == ModelNeed(
        "chat", 16 * GIB, 8 * GIB, "team-a", Isolation.HARDWARE, 5.0, 16, 400.0, 40.0, 11.5, 3
    )


def test_a_model_that_the_node_knows_needs_no_sizes() -> None:
    whole, half, said = read(
        "- {model: chat@2, requests: 4}",
        "- {name: half, model: chat@2, requests: 4, context_tokens: 4096}",
        "- {name: said, model: chat@2, kv: 3GiB}",
    )
    assert (whole.name, whole.weights_bytes) == ("chat@2", 8 * GIB)
    assert (whole.kv_bytes, half.kv_bytes, said.kv_bytes) == (4 * GIB, 2 * GIB, 3 * GIB)
    (longer,) = read("- {model: chat@2, context_tokens: 100000}")
    assert longer.kv_bytes == GIB, "no request is longer than the model allows"


def test_copies_are_models_of_their_own() -> None:
    models = read("- {name: a, weights: 1GiB, kv: 1GiB, copies: 3}", "- {name: b, model: chat@2}")
    assert [each.name for each in models] == ["a#1", "a#2", "a#3", "b"]
    assert [each.line for each in models] == [3, 3, 3, 4]


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        (["- {weights: 1GiB, kv: 1GiB}"], 3, "give it a name"),
        (["- {name: a}"], 3, "say either model"),
        (["- {name: a, model: chat@2, weights: 1GiB}"], 3, "say either model"),
        (["- {name: a, weights: 1GiB}"], 3, "say kv"),
        (["- {model: chat@2, kv: 1GiB, context_tokens: 5}"], 3, "take one of them away"),
        (["- {name: a, weights: 1GB, kv: 1GiB}"], 3, "is not a size"),
        (
            ["- name: a", "  weights: 1GiB", "  kv: 1GiB", "  wieght: 2"],
            6,
            "did you mean 'weights'",
        ),
        (["- name: a", "  model: caht"], 4, "there is no model 'caht'"),
        (["- {name: a, model: chat@2, isolation: total}"], 3, "isolation"),
        (["- {name: a, model: chat@2, tenant: Team A}"], 3, "tenant"),
        (["- {name: a, model: chat@2, value: 0}"], 3, "greater than 0"),
        (["- {name: a, model: chat@2, ms_per_token: .nan}"], 3, "ms_per_token"),
        (["- {name: a, model: chat@2, copies: 65}"], 3, "copies"),
        (["- {name: a, model: chat@2}", "- {name: a, model: chat@2}"], 4, "line 3's already"),
        ([f"- {{name: a{i}, model: chat@2, copies: 64}}" for i in range(5)], 2, "320 models"),
        (["[]"], 2, "at least 1 item"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(lines: list[str], line: int, words: str) -> None:
    assert MODELS_MAX < 320
    with pytest.raises(DocumentError, match=words) as refused:
        read(*lines)
    assert refused.value.line == line
