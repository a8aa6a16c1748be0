"""How a model's weights lie in its image: fused, and in the order in which they are used.

Owns the engine's names for tensors and which of a checkpoint's tensors each is stacked from. It
never reads a file and never imports torch. Invariant: recipes come in layer order, so that a copy
in this order can be computed behind: -1 is the embedding, 0 to n-1 the layers, n what follows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from engine.errors import CheckpointInvalid
from engine.models.spec import ModelSpec
from swap.image import TensorRecipe

EMBEDDING_LAYER = -1
# Not, for instance, the rotary frequencies that old checkpoints carry: those are computed.
_LAYER_WEIGHT = re.compile(r"model\.layers\.\d+\..*\.(weight|bias)")


def image_recipes(spec: ModelSpec) -> tuple[TensorRecipe, ...]:
    """The tensors of a model's image, in the order in which a step uses them.

    A recipe's sources are stacked on dimension 0: query over key over value, gate over up, so that
    a step does one matrix product for each.
    """
    return (*_embedding(spec), *_layers(spec), *_ending(spec))


def check_all_used(recipes: Iterable[TensorRecipe], names: Iterable[str]) -> None:
    """Whether every weight of the checkpoint's layers goes into the image.

    What is left over belongs to another computation than the configuration's: more layers, biases,
    norms. Raises CheckpointInvalid naming a tensor.
    """
    used = {source for recipe in recipes for source in recipe.sources}
    for name in sorted(names):
        if name not in used and _LAYER_WEIGHT.fullmatch(name):
            raise CheckpointInvalid(
                f"the files hold {name}, which a model of this config.json does not use: the two "
                "are of different models; fetch both again",
                tensor=name,
            )


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors start with."""
    return f"layers.{layer}."


def _embedding(spec: ModelSpec) -> Iterator[TensorRecipe]:
    yield TensorRecipe(
        name="embedding",
        layer=EMBEDDING_LAYER,
        sources=("model.embed_tokens.weight",),
        shape=(spec.vocabulary, spec.hidden),
    )


def _layers(spec: ModelSpec) -> Iterator[TensorRecipe]:
    query, key_value = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden, intermediate = spec.hidden, spec.intermediate
    fused = query + 2 * key_value
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    parts: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
        ("attention_norm", ("input_layernorm.weight",), (hidden,)),
        ("qkv", tuple(f"{name}.weight" for name in attention), (fused, hidden)),
    ]
    if spec.qkv_bias:
        parts.append(("qkv_bias", tuple(f"{name}.bias" for name in attention), (fused,)))
    if spec.query_key_norm:
        parts.append(("query_norm", ("self_attn.q_norm.weight",), (spec.head_dim,)))
        parts.append(("key_norm", ("self_attn.k_norm.weight",), (spec.head_dim,)))
    parts += [
        ("attention_output", ("self_attn.o_proj.weight",), (hidden, query)),
        ("mlp_norm", ("post_attention_layernorm.weight",), (hidden,)),
        ("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), (2 * intermediate, hidden)),
        ("down", ("mlp.down_proj.weight",), (hidden, intermediate)),
    ]
    for layer in range(spec.layers):
        for name, sources, shape in parts:
            yield TensorRecipe(
                name=layer_prefix(layer) + name,
                layer=layer,
                sources=tuple(f"model.layers.{layer}.{source}" for source in sources),
                shape=shape,
            )


def _ending(spec: ModelSpec) -> Iterator[TensorRecipe]:
    yield TensorRecipe(
        name="norm", layer=spec.layers, sources=("model.norm.weight",), shape=(spec.hidden,)
    )
    if not spec.tied:
        yield TensorRecipe(
            name="head",
            layer=spec.layers,
            sources=("lm_head.weight",),
            shape=(spec.vocabulary, spec.hidden),
        )
