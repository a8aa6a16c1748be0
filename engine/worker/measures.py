"""What an image and a spec say about a resident: its limits, its least KV, where its tensors lie.

Owns the translation, and keeps nothing. It never touches a page. Invariant: the same image and spec
give the same answer on every worker with pages of that size.
"""

from __future__ import annotations

import torch

from engine.device_tensors import bytes_at
from engine.kv_layout import KvLayout
from engine.kv_window import KvWindow
from engine.limits import EngineLimits
from engine.link.control import WEIGHT_MAX, WEIGHT_MIN, EngineSpec
from engine.models.spec import ModelSpec
from engine.worker.errors import OptionInvalid
from swap.arena import Region
from swap.image import Manifest


def kv_pages_min(spec: EngineSpec, manifest: Manifest, page_bytes: int, step_tokens: int) -> int:
    """Pages of KV that one request of the longest length takes at once."""
    model = ModelSpec.from_dict(manifest.model)
    fp8 = spec.kv_dtype == "fp8"
    layout = KvLayout.choose(model, manifest.dtype, page_bytes, fp8=fp8)
    computed = max(step_tokens, spec.running_requests_max)
    window = KvWindow(model.window_tokens, computed, layout.block_tokens)
    return layout.pages_of(window.blocks_for(spec.context_tokens))


def weight_views(manifest: Manifest, region: Region) -> dict[str, torch.Tensor]:
    """The image's tensors in a region, by name; nothing is touched until they are used."""
    whole = bytes_at(region.pool.device.kind, region.address, manifest.weights_bytes)
    views: dict[str, torch.Tensor] = {}
    for entry in manifest.tensors:
        flat = whole[entry.offset_bytes : entry.offset_bytes + entry.size_bytes]
        views[entry.name] = flat.view(getattr(torch, entry.dtype)).view(entry.shape)
    return views


def limits_of(
    spec: EngineSpec, step_tokens: int, *, prefix_cache: bool, strict: bool = False
) -> EngineLimits:
    """What an engine is allowed. Raises OptionInvalid, for a weight out of its range too."""
    if not WEIGHT_MIN <= spec.weight <= WEIGHT_MAX:
        raise OptionInvalid(
            f"{spec.model} cannot be run with weight {spec.weight:g}: "
            f"it must be from {WEIGHT_MIN:g} to {WEIGHT_MAX:g}"
        )
    try:
        return EngineLimits(
            context_tokens=spec.context_tokens,
            running_requests_max=spec.running_requests_max,
            waiting_requests_max=spec.waiting_requests_max,
            step_tokens=max(step_tokens, spec.running_requests_max),
            prefix_cache=prefix_cache,
            fp8_kv=spec.kv_dtype == "fp8",
            strict=strict,
        )
    except ValueError as error:
        raise OptionInvalid(f"{spec.model} cannot be run: {error}") from error
