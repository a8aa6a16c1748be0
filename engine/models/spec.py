"""What a checkpoint is: the frozen shape of a dense decoder, read from its configuration files.

Owns the reading of `config.json` and `generation_config.json` and the list of what is supported.
It never looks at weights and never imports torch or numpy. Invariant: a `ModelSpec` that exists
can be run exactly as its configuration says; whatever is not implemented is refused here by name
and never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

from engine.errors import ArchitectureUnsupported, CheckpointInvalid
from engine.models.fields import Fields
from engine.models.windows import read_windows

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

ARCHITECTURES: Mapping[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "llama3")
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
FP8 = "float8_e4m3fn"
"""What keys and values may be stored as, besides what is computed in: four bits of exponent and
three of mantissa, no infinities, and nothing beyond 448."""
HEAD_DIM_MAX = 512
LAYERS_MAX = 1024
# Fields whose mere presence means another computation than the four families' own.
FOREIGN_FIELDS = (
    "quantization_config",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "attention_chunk_size",
    "final_logit_softcapping",
    "attn_logit_softcapping",
)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotary position embedding: its base, and how its frequencies are stretched."""

    theta: float
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of one dense decoder.

    Sizes are in elements, `context_tokens` in tokens. `heads` query heads share `kv_heads` key and
    value heads; each is `head_dim` wide, which need not be `hidden / heads`.
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context_tokens: int
    tied: bool
    """The embedding is also the output layer."""
    norm_epsilon: float
    rope: Rope
    eos_token_ids: tuple[int, ...]
    windows: tuple[int, ...] = ()
    """Tokens that a query of each layer sees, its own included; 0 is all of them. Empty where every
    layer sees all."""

    @property
    def window_tokens(self) -> int:
        """How far back any layer looks; 0 is to the beginning."""
        return max(self.windows) if self.windows and all(self.windows) else 0

    def window_of(self, layer: int) -> int:
        """Tokens that a query of a layer sees; 0 is all of them."""
        return self.windows[layer] if self.windows else 0

    @property
    def windows_seen(self) -> tuple[int, ...]:
        """The windows that layers have, each once: what a step is prepared for."""
        return tuple(sorted(set(self.windows))) or (0,)

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""
        return self.family == "qwen2"

    @property
    def query_key_norm(self) -> bool:
        """Whether each query and key head is normalised before its rotation."""
        return self.family == "qwen3"

    @property
    def parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (query + 2 * key_value) + query * self.hidden
        layer += 3 * self.hidden * self.intermediate + 2 * self.hidden
        if self.qkv_bias:
            layer += query + 2 * key_value
        if self.query_key_norm:
            layer += 2 * self.head_dim
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * layer + self.hidden

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token's keys and values over all layers."""
        item_bytes = 1 if dtype == FP8 else DTYPE_BYTES[dtype]
        return 2 * self.layers * self.kv_heads * self.head_dim * item_bytes

    @classmethod
    def from_directory(cls, path: Path | str) -> Self:
        """Read a checkpoint folder in Hugging Face layout.

        Raises CheckpointInvalid (file and field named) or ArchitectureUnsupported.
        """
        directory = Path(path)
        config = Fields.from_file(directory / "config.json")
        generation_path = directory / "generation_config.json"
        generation = Fields({}, generation_path.name)
        if generation_path.exists():
            generation = Fields.from_file(generation_path)
        family = _family(config)
        _refuse_unsupported(config, family)
        heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
        if config.integer("num_hidden_layers") > LAYERS_MAX:
            raise config.invalid("num_hidden_layers", f"at most {LAYERS_MAX} are supported")
        return cls(
            family=family,
            layers=(layers := config.integer("num_hidden_layers")),
            hidden=hidden,
            heads=heads,
            kv_heads=_kv_heads(config, heads, family),
            head_dim=_head_dim(config, hidden, heads, family),
            intermediate=config.integer("intermediate_size"),
            vocabulary=(vocabulary := config.integer("vocab_size")),
            context_tokens=config.integer("max_position_embeddings"),
            tied=config.boolean("tie_word_embeddings", False),
            norm_epsilon=config.number("rms_norm_eps", 1e-6),
            rope=_rope(config),
            # What generation_config says wins, as it does where the checkpoint was published from.
            eos_token_ids=generation.token_ids("eos_token_id", vocabulary)
            or config.token_ids("eos_token_id", vocabulary),
            windows=read_windows(config, family, layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for an image's manifest; `from_dict` reads them back."""
        values = asdict(self)
        values["eos_token_ids"] = list(self.eos_token_ids)
        values["windows"] = list(self.windows)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote. Raises CheckpointInvalid for anything else."""
        try:
            rope = values["rope"]
            scaling = rope["scaling"]
            fields = dict(values)
            fields["rope"] = Rope(rope["theta"], Llama3Scaling(**scaling) if scaling else None)
            fields["eos_token_ids"] = tuple(values["eos_token_ids"])
            fields["windows"] = tuple(values.get("windows", ()))
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise CheckpointInvalid(f"this is no model's shape: {error!r}") from error


def _family(config: Fields) -> Family:
    supported = ", ".join(ARCHITECTURES)
    named = config.texts("architectures")
    model_type = config.text("model_type", "")
    if named:
        family = ARCHITECTURES.get(named[0]) if len(named) == 1 else None
    else:
        family = cast(Family, model_type) if model_type in ARCHITECTURES.values() else None
    shown = ", ".join(named) or model_type or "nothing"
    if family is None or (model_type and model_type != family):
        raise ArchitectureUnsupported(
            f"{config.where} names the architecture {shown} (model_type {model_type!r}); "
            f"supported are {supported}",
            architecture=shown,
            supported=supported,
        )
    return family


def _refuse_unsupported(config: Fields, family: Family) -> None:
    def refuse(name: str, why: str) -> ArchitectureUnsupported:
        return ArchitectureUnsupported(
            f"{config.where}: {name} is {str(config.values.get(name))[:80]}; {why}",
            architecture=family,
            field=name,
        )

    for name in FOREIGN_FIELDS:
        if config.has(name):
            raise refuse(name, f"{family} models with it are not supported; use one without")
    for name in ("attention_bias", "mlp_bias"):
        if config.boolean(name, False):
            raise refuse(name, "of the biases only qwen2's, on query, key and value, is supported")
    if (activation := config.text("hidden_act", "silu")) != "silu":
        raise refuse("hidden_act", f"only silu is supported, not {activation}")
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise refuse("partial_rotary_factor", "only whole heads can be rotated")


def _kv_heads(config: Fields, heads: int, family: Family) -> int:
    # Only Llama's first configurations leave the number out, and mean one per query head.
    kv_heads = config.integer("num_key_value_heads", heads if family == "llama" else None)
    if heads % kv_heads:
        raise config.invalid(
            "num_key_value_heads", f"num_attention_heads, {heads}, must be a multiple of it"
        )
    return kv_heads


def _head_dim(config: Fields, hidden: int, heads: int, family: Family) -> int:
    if config.has("head_dim"):
        head_dim = config.integer("head_dim")
    elif family == "qwen3" or hidden % heads:
        raise config.invalid("head_dim", "it must be given: it does not follow from hidden_size")
    else:
        head_dim = hidden // heads
    if head_dim % 2 or head_dim > HEAD_DIM_MAX:
        raise config.invalid("head_dim", f"it must be even and at most {HEAD_DIM_MAX}")
    return head_dim


def _rope(config: Fields) -> Rope:
    """Rotary parameters from `rope_parameters`, or `rope_theta` and `rope_scaling` before it."""
    name = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    rope = config.object(name)
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0))
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise ArchitectureUnsupported(
            f"{config.where}: {name} differs between layers, which is not supported", field=name
        )
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_TYPES or rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise ArchitectureUnsupported(
            f"{config.where}: {name} asks for {kind}; supported are {', '.join(ROPE_TYPES)}, "
            "over whole heads",
            field=name,
            supported=", ".join(ROPE_TYPES),
        )
    if kind == "default":
        return Rope(theta)
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context_tokens=rope.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.invalid("high_freq_factor", "it must be above low_freq_factor")
    return Rope(theta, scaling)
