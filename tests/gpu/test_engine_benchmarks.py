"""The engine's benchmarks: their arithmetic, their workloads, and that each runs as it stands."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import decode, first_token, lengths, offline, operations, together
from bench.decode import Grid
from bench.engine_stage import Stage, run_engine, spec_of
from bench.roofline import decode_bytes, measure, prefill_operations
from engine.kv_layout import KvLayout
from engine.limits import EngineLimits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage.make(spec_of("28M", 128, tiny=True), CPU, "float32")


def dry_run(module: ModuleType, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "result.json"
    common = ["--device", "cuda", "--fake", "--threads", "1", "--output", str(output)]
    assert module.main([*common, *arguments]) == 0
    result = dict(json.loads(output.read_text()))
    assert "(dry run)" in result["name"]
    assert all(figure["met"] is None for figure in result["figures"])
    assert not [one for one in result["figures"] if "failed" in one["measured"]]
    return result


@pytest.mark.parametrize(
    ("model", "read_gb", "kv_kib", "batch_32_gb"),
    # Weights of the real models of these shapes, and of a step of 32 decodes at 1,024 tokens.
    [("1B", 2.47, 32, 3.55), ("8B", 15.0, 128, 19.3), ("0.6B", 1.19, 112, 4.95)],
)
def test_a_step_reads_the_weights_and_the_contexts(
    model: str, read_gb: float, kv_kib: int, batch_32_gb: float
) -> None:
    spec = spec_of(model, 2048)
    assert decode_bytes(spec, "bfloat16", 0, 0) / 1e9 == pytest.approx(read_gb, rel=0.01)
    assert spec.kv_bytes_per_token("bfloat16") == kv_kib << 10
    step = decode_bytes(spec, "bfloat16", 32, 1024)
    assert step / 1e9 == pytest.approx(batch_32_gb, rel=0.01)


def test_a_prompt_needs_two_operations_a_weight_and_token_and_more_the_longer_it_is() -> None:
    spec = spec_of("8B", 8192)
    short, long = prefill_operations(spec, 1), prefill_operations(spec, 8192)
    assert short / 2e9 == pytest.approx(7.5, rel=0.01)
    # Of 8,192 tokens the weights of the layers take 114 and attention 17.6 Tflop.
    assert long / 1e12 == pytest.approx(114.3 + 17.6, rel=0.01)


def test_limits_are_rates() -> None:
    limits = measure(CPU, "float32", small=True)
    assert limits.bytes_per_s > 1e8
    assert limits.operations_per_s > 1e8


def test_both_sides_compute_the_same_tokens_each_to_its_own_length(stage: Stage) -> None:
    prompts, answers = stage.prompts([5, 17, 40]), [3, 9, 6]
    with stage.engine(EngineLimits(64, 3, 8, 32), 256) as engine:
        own = run_engine(engine, prompts, answers)
    peer = stage.run_peer(prompts, answers, 32)
    assert [len(one) for one in own.tokens] == answers
    assert own.tokens == peer.tokens
    assert own.generated == sum(answers)
    assert all(0 < begun <= own.seconds for begun in own.first_token_s)


def test_a_request_that_cannot_run_ends_a_benchmark(stage: Stage) -> None:
    with (
        stage.engine(EngineLimits(16, 1, 8, 16), 32) as engine,
        pytest.raises(RuntimeError, match=r"request 0: the prompt has 20 tokens"),
    ):
        run_engine(engine, stage.prompts([20]), [1])


def test_weights_that_are_not_fused_are_the_same_memory(stage: Stage) -> None:
    state = stage.peer.state_dict()
    assert stage.weights["layers.0.down"].data_ptr() == (
        state["model.layers.0.mlp.down_proj.weight"].data_ptr()
    )
    query = state["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(stage.weights["layers.0.qkv"][: len(query)], query)


def test_the_committed_table_of_chats_is_as_it_was_drawn() -> None:
    table = lengths.chats()
    assert table == lengths.draw_chats()
    assert len(table) == 1000
    answers, prompts = ([getattr(one, of) for one in table] for of in ("answer", "prompt"))
    assert 150 < sum(answers) / 1000 < 300
    assert sorted(prompts)[500] < sum(prompts) / 1000, "most are short, some very long"
    assert max(prompts) == lengths.CHAT_LENGTH_MAX


def test_uniform_requests_are_as_many_and_as_long_as_others_take() -> None:
    table = lengths.uniform()
    assert len(table) == 256
    assert {100 <= length <= 1024 for one in table for length in (one.prompt, one.answer)} == {True}
    assert table == lengths.uniform()


def test_only_cases_are_measured_whose_kv_there_is_room_for() -> None:
    grid = Grid.of("8B", "cuda", fake=False)
    cases = grid.cases()
    assert {(256, 1024), (32, 8192), (8, 32_768)} <= set(cases)
    assert (128, 8192) not in cases
    layout = KvLayout.choose(spec_of("8B", grid.context_tokens), "bfloat16", 64 << 20)
    page_tokens = layout.blocks_per_page * layout.block_tokens
    largest = max(
        batch * (context + decode.drawn_tokens(grid, batch, context)) for batch, context in cases
    )
    assert largest / page_tokens * (64 << 20) < 60e9
    assert {batch for _, batch in decode.REACH} <= {b for b, c in cases if c == grid.contexts[0]}
    for batch, context in cases:
        drawn = decode.drawn_tokens(grid, batch, context)
        assert context + drawn <= grid.context_tokens


def test_decoding_runs_dry(tmp_path: Path) -> None:
    result = dry_run(decode, tmp_path)
    found = result["measurements"]
    assert set(found["step_s"]) == {"1 x 24", "3 x 24", "1 x 48"}
    assert set(found["peer_step_s"]) == {"3 x 24"}
    assert all(seconds > 0 for seconds in found["step_s"].values())


def test_first_tokens_run_dry(tmp_path: Path) -> None:
    found = dry_run(first_token, tmp_path, "--rounds", "2")["measurements"]["first_token_s"]
    assert {name: len(seconds) for name, seconds in found.items()} == {"8": 2, "40": 2, "again": 2}


@pytest.mark.parametrize(("workload", "requests"), [("chats", 5), ("uniform", 2)])
def test_workloads_run_dry(workload: str, requests: int, tmp_path: Path) -> None:
    result = dry_run(offline, tmp_path, "--workload", workload)
    assert result["parameters"]["requests"] == requests
    assert result["measurements"]["engine_s"] > 0
    assert result["measurements"]["peer_s"] > 0


def test_two_engines_at_once_run_dry(tmp_path: Path) -> None:
    found = dry_run(together, tmp_path, "--rounds", "1")["measurements"]
    assert len(found["two_engines_s"]) == len(found["one_engine_s"]) == 1


def test_operations_run_dry_over_every_layer(tmp_path: Path) -> None:
    found = dry_run(operations, tmp_path)["measurements"]["seconds"]
    assert set(found) == {"1", "2"}
    assert len(found["1"]) == 9
    assert all(seconds > 0 for seconds in found["1"].values())
