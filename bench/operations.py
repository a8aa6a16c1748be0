"""Where a step's time goes: each operation of a layer, with its bytes and its share of the rate.

    python -m bench.operations --model 28M                      on the processor
    python -m bench.operations --device cuda --model 8B         on a GPU

Each operation of a decode step goes over all layers in turn, so that weights come from memory and
not from a cache, and is quoted for one layer. On a GPU the calls are replayed as one graph: what is
measured is the device's time and not the host's. Bytes are what the operation must read and write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.engine_stage import HOST_PAGE_BYTES, MODELS, Stage, arguments, stage_of
from bench.results import Figure, report
from bench.roofline import measure, seconds_of
from engine.kernels.choose import choose_kernels
from engine.kernels.protocol import Kernels, Span
from engine.kv_layout import KvLayout
from engine.models.decoder import Layer
from engine.models.spec import DTYPE_BYTES
from swap.cuda_device import PAGE_BYTES

CONTEXTS = {"cuda": 1024, "cpu": 512, "fake": 24}
BATCHES = {"cuda": (1, 32, 128), "cpu": (1, 8, 32), "fake": (1, 2)}


@dataclass(frozen=True)
class Operation:
    """One operation of a layer; `run(layer)` calls it, `size_bytes` is what it moves."""

    name: str
    run: Callable[[int], object]
    size_bytes: int
    calls: int = 1
    """In each layer."""


def operations(stage: Stage, kernels: Kernels, batch: int, context: int) -> list[Operation]:
    """A decode step's operations for one batch, but for the lookup and the drawing of tokens."""
    spec, item = stage.spec, DTYPE_BYTES[stage.dtype]
    layers = [Layer.of(spec, stage.weights, index) for index in range(spec.layers)]
    dtype = getattr(torch, stage.dtype)

    def rows(width: int) -> torch.Tensor:
        return torch.randn(batch, width, device=stage.device).to(dtype)

    heads, hidden, inner = spec.heads * spec.head_dim, spec.hidden, spec.intermediate
    fused = heads + 2 * spec.kv_heads * spec.head_dim
    wide, attended, narrow, gate_up = rows(fused), rows(heads), rows(hidden), rows(2 * inner)
    middle, residual = rows(inner), rows(hidden)
    queries = attended.view(batch, spec.heads, spec.head_dim)
    layout = KvLayout.choose(spec, stage.dtype, _page_bytes(stage))
    blocks = layout.blocks_for(context)
    spans = [Span(context - 1, 1, range(one * blocks, (one + 1) * blocks)) for one in range(batch)]
    plan = kernels.plan(spans, torch.full((batch,), context - 1))
    epsilon, linear = spec.norm_epsilon, kernels.linear
    head = stage.weights["embedding" if spec.tied else "head"]

    def product(weight: torch.Tensor) -> int:
        return item * (weight.numel() + batch * sum(weight.shape))

    return [
        Operation(
            "query, key, value", lambda n: linear(narrow, layers[n].qkv), product(layers[0].qkv)
        ),
        Operation(
            "rotate and store",
            lambda n: kernels.rotate_and_store(n, wide, layers[n].head_norms, epsilon, plan),
            2 * item * wide.numel(),
        ),
        Operation(
            "attention",
            lambda n: kernels.attend(n, queries, plan),
            item * (2 * attended.numel() + 2 * batch * context * spec.kv_heads * spec.head_dim),
        ),
        Operation(
            "attention's output",
            lambda n: linear(attended, layers[n].attention_output),
            product(layers[0].attention_output),
        ),
        Operation(
            "add and norm",
            lambda n: kernels.add_rms_norm(narrow, residual, layers[n].mlp_norm, epsilon),
            4 * item * narrow.numel(),
            2,
        ),
        Operation(
            "gate and up", lambda n: linear(narrow, layers[n].gate_up), product(layers[0].gate_up)
        ),
        Operation(
            "activation",
            lambda n: kernels.gated_activation(gate_up),
            item * (gate_up.numel() + middle.numel()),
        ),
        Operation("down", lambda n: linear(middle, layers[n].down), product(layers[0].down)),
        Operation(
            "logits, a layer's part",
            lambda n: linear(narrow, head) if not n else None,
            product(head) // spec.layers,
        ),
    ]


def layer_s(operation: Operation, layers: int, device: torch.device) -> float:
    """Seconds of one call, from a pass over all layers."""

    def once() -> None:
        for layer in range(layers):
            operation.run(layer)

    if device.type != "cuda":
        return seconds_of(once, device) / layers
    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()
    return seconds_of(graph.replay, device) / layers


@torch.inference_mode()
def measure_batch(stage: Stage, batch: int, context: int) -> list[tuple[Operation, float]]:
    """Every operation and its seconds, over KV memory that is all zeros."""
    layout = KvLayout.choose(stage.spec, stage.dtype, _page_bytes(stage))
    blocks = batch * layout.blocks_for(context)
    with stage.kv_space(blocks * layout.block_tokens) as space:
        space.grow(space.pages_max)
        memory = space.memory()
        memory.zero_()
        kernels = choose_kernels(stage.spec, layout, memory)
        return [
            (operation, layer_s(operation, stage.spec.layers, stage.device))
            for operation in operations(stage, kernels, batch, context)
        ]


def _page_bytes(stage: Stage) -> int:
    return PAGE_BYTES if stage.device.type == "cuda" else HOST_PAGE_BYTES


def main(values: Sequence[str] | None = None) -> int:
    """Run and print; there is no bound."""
    options = arguments("bench.operations", MODELS, "28M").parse_args(values)
    kind = "fake" if options.fake else options.device
    context = CONTEXTS[kind]
    stage = stage_of(options, context + 1)
    rate = measure(stage.device, stage.dtype, small=options.fake).bytes_per_s
    figures = [Figure("memory, measured", f"{rate / 1e9:.1f} GB/s")]
    found: dict[str, dict[str, float]] = {}
    for batch in BATCHES[kind]:
        timed = measure_batch(stage, batch, context)
        total_s = sum(operation.calls * seconds for operation, seconds in timed)
        found[str(batch)] = {operation.name: seconds for operation, seconds in timed}
        figures.append(
            Figure(f"batch {batch}, context {context}: a layer", f"{1e6 * total_s:.1f} us")
        )
        for operation, seconds in timed:
            share = operation.size_bytes / rate / seconds
            times = f"{operation.calls} x " if operation.calls > 1 else ""
            moved = f"{operation.size_bytes / 1e6:.2f} MB"
            figures.append(
                Figure(
                    f"  {operation.name}",
                    f"{times}{1e6 * seconds:.1f} us, {moved}, {share:.0%}",
                )
            )
    report(
        f"operations of a layer, {options.model} in {stage.dtype} on {stage.device.type}"
        + (" (dry run)" if options.fake else ""),
        figures,
        parameters={
            "shape": stage.spec.to_dict(),
            "dtype": stage.dtype,
            "threads": options.threads,
            "context": context,
        },
        measurements={"seconds": found},
        output=options.output,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
