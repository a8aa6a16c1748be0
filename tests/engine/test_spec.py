"""Reading configurations: what each family means, and what is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ArchitectureUnsupported, CheckpointInvalid
from engine.models.layout import image_recipes
from engine.models.spec import Llama3Scaling, ModelSpec, Rope
from swap.image import plan_image
from tests.engine.checkpoints import LLAMA3, SHAPES, Checkpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
}


def read(directory: Path, generation: Any = None, **changes: Any) -> ModelSpec:
    """The spec of LLAMA with `changes`; a change to `...` leaves the field out."""
    config = {name: value for name, value in (LLAMA | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelSpec.from_directory(directory)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_transformers_writes_is_read_back(
    shape: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    made = checkpoint(shape)
    spec, config = made.spec, made.oracle.config
    assert spec.family == config.model_type
    assert spec.heads == config.num_attention_heads
    assert spec.kv_heads == config.num_key_value_heads
    assert spec.tied == config.tie_word_embeddings
    assert spec.parameters == made.oracle.num_parameters()
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * spec.layers
    slides = [kind == "sliding_attention" for kind in kinds]
    assert [spec.window_of(layer) for layer in range(spec.layers)] == [
        window * slide for slide in slides
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_recipes_use_every_tensor_once_in_layer_order(
    shape: str, checkpoint: Callable[[str], Checkpoint]
) -> None:
    made = checkpoint(shape)
    recipes = image_recipes(made.spec)
    layers = [recipe.layer for recipe in recipes]
    assert layers == sorted(layers)
    assert set(layers) == set(range(-1, made.spec.layers + 1))
    used = [source for recipe in recipes for source in recipe.sources]
    state = set(made.oracle.state_dict())
    if made.spec.tied:
        state.discard("lm_head.weight")
    assert sorted(used) == sorted(state)
    manifest = plan_image(recipes, "float32", made.spec.to_dict())
    assert manifest.weights_bytes >= made.spec.parameters * 4


def test_reading_needs_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, engine.models.layout, engine.models.spec;"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_rope_in_the_old_and_the_new_way_of_writing_it(tmp_path: Path) -> None:
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 32)
    old = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    older = {"type": old["rope_type"]} | old
    del older["rope_type"]
    assert read(tmp_path).rope == Rope(10_000.0)
    assert read(tmp_path, rope_theta=5e5).rope == Rope(5e5)
    assert read(tmp_path, rope_theta=5e5, rope_scaling=None).rope == Rope(5e5)
    assert read(tmp_path, rope_theta=5e5, rope_scaling=old).rope == Rope(5e5, scaling)
    assert read(tmp_path, rope_theta=5e5, rope_scaling=older).rope == Rope(5e5, scaling)
    assert read(tmp_path, rope_parameters=LLAMA3).rope == Rope(10_000.0, scaling)
    parameters = {"rope_type": "default", "rope_theta": 7e4}
    assert read(tmp_path, rope_parameters=parameters, rope_theta=1.0).rope == Rope(7e4)


def test_defaults_that_configurations_leave_out(tmp_path: Path) -> None:
    assert read(tmp_path).head_dim == 16
    assert read(tmp_path, head_dim=None).head_dim == 16
    assert read(tmp_path, num_key_value_heads=...).kv_heads == 4
    assert read(tmp_path, architectures=...).family == "llama"
    assert not read(tmp_path).tied


def test_end_of_sequence_from_either_file(tmp_path: Path) -> None:
    assert read(tmp_path).eos_token_ids == (7,)
    assert read(tmp_path, eos_token_id=[3, 4, 3]).eos_token_ids == (3, 4)
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()
    assert read(tmp_path, {"eos_token_id": [9, 8]}).eos_token_ids == (9, 8)
    assert read(tmp_path, {}).eos_token_ids == (7,)


def test_windows_that_never_close_are_accepted(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    assert read(tmp_path, **mistral, sliding_window=None).family == "mistral"
    assert read(tmp_path, **mistral, sliding_window=128).family == "mistral"
    assert read(tmp_path, **qwen2, sliding_window=16, use_sliding_window=False).qkv_bias
    assert read(tmp_path, **mistral, sliding_window=128).windows == ()
    assert read(tmp_path, sliding_window=16, use_sliding_window=True).windows == (), "of a llama"


def test_windows_by_layer(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 16}
    qwen2["use_sliding_window"] = True
    assert read(tmp_path, **mistral, sliding_window=127).windows == (127, 127)
    assert read(tmp_path, **mistral, max_position_embeddings=8192).windows == (4096, 4096)
    assert read(tmp_path, **qwen2).windows == (), "the first 28 layers see all"
    mixed = read(tmp_path, **qwen2, max_window_layers=1)
    assert (mixed.windows, mixed.window_tokens, mixed.windows_seen) == ((0, 16), 0, (0, 16))
    every = read(tmp_path, **qwen2, max_window_layers=0)
    assert (every.windows, every.window_tokens, every.windows_seen) == ((16, 16), 16, (16,))
    kinds = ["sliding_attention", "full_attention"]
    assert read(tmp_path, **qwen2, layer_types=kinds).windows == (16, 0), "what is named wins"
    with pytest.raises(CheckpointInvalid, match="each of 2 layers"):
        read(tmp_path, **qwen2, layer_types=kinds[:1])
    for config in (mistral | {"sliding_window": 16}, qwen2 | {"use_sliding_window": False}):
        with pytest.raises(ArchitectureUnsupported, match="layer_types is"):
            read(tmp_path, **config, layer_types=kinds)
    with pytest.raises(ArchitectureUnsupported, match="chunked"):
        read(tmp_path, **qwen2, layer_types=["chunked_attention"] * 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "LlamaForCausalLM, Mist"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "Qwen3ForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "supported are"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"architectures": ..., "model_type": ...}, "names the architecture nothing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "asks for yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "default, llama3"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "between layers"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ArchitectureUnsupported, match=named) as caught:
        read(tmp_path, **changes)
    assert caught.value.reason == "ARCH_UNSUPPORTED"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": 100}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": LLAMA3 | {"factor": None}}, "factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointInvalid, match=rf"config\.json.*{field}") as caught:
        read(tmp_path, **changes)
    assert caught.value.reason == "CHECKPOINT_INVALID"
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, b" " * (5 << 20)]
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=r"config\.json"):
        ModelSpec.from_directory(tmp_path)


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="No such file"):
        ModelSpec.from_directory(tmp_path)
    with pytest.raises(CheckpointInvalid, match="no model's shape"):
        ModelSpec.from_dict({"family": "llama"})
