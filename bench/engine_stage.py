"""One model of random weights on one device, for the engine and for transformers beside it.

Owns what the benchmarks of the engine share: shapes, weights in both layouts (those that are not
fused are the same memory), engines over KV memory of the right kind, and the peer's continuous
batching. It never times anything but whole runs, and never says what is good. Invariant: both sides
compute the same model on the same device in the same dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from bench.shapes import GPU_SHAPES, TINY, gpu_shape
from bench.worker import decoder
from engine.choose_stepper import choose_stepper
from engine.engine import Engine
from engine.graphs import CudaGraphs
from engine.kv_layout import KvLayout
from engine.kv_space import KvSpace, PlainKvSpace, RegionKvSpace
from engine.limits import EngineLimits
from engine.link.tokens import Sampling
from engine.models.layout import image_recipes
from engine.models.spec import ModelSpec, Rope
from swap.arena import PagePool, Region
from swap.cuda_device import PAGE_BYTES, CudaDevice

MODELS = ("28M", "0.6B", *(name for name in GPU_SHAPES if name != "30B"))
HOST_PAGE_BYTES = 2 << 20
PEER_PAGE_TOKENS = 256
KV_TOKENS_MAX = 400_000
"""Of either side: of an 8B in bf16 they take 52 GB."""
PEER_LOOK_S, PEER_END_TIMEOUT_S = 1.0, 30.0
SEED = 1

Tokens = list[list[int]]


def spec_of(model: str, context_tokens: int, *, tiny: bool = False) -> ModelSpec:
    """The shape of a name: 28M is this project's own, 0.6B that of Qwen3, others of Llama 3."""
    if tiny:
        spec = decoder(*TINY)
    elif model == "28M":
        spec = dataclasses.replace(
            decoder(8192, 512, 8), heads=8, kv_heads=4, intermediate=1408, tied=True
        )
    elif model == "0.6B":
        spec = ModelSpec(
            family="qwen3",
            layers=28,
            hidden=1024,
            heads=16,
            kv_heads=8,
            head_dim=128,
            intermediate=3072,
            vocabulary=151_936,
            context_tokens=context_tokens,
            tied=True,
            norm_epsilon=1e-6,
            rope=Rope(theta=1_000_000.0),
            eos_token_ids=(),
        )
    else:
        spec = gpu_shape(model)
    return dataclasses.replace(spec, context_tokens=context_tokens)


@dataclass(frozen=True)
class Run:
    """Prompts through one side: what came out, how long it took, and when each request began to
    answer (the engine's alone). Seconds."""

    tokens: Tokens
    seconds: float
    first_token_s: tuple[float, ...] = ()

    @property
    def generated(self) -> int:
        return sum(map(len, self.tokens))


@dataclass(frozen=True)
class Stage:
    """A model on a device. `peer` is transformers' model of the same weights."""

    spec: ModelSpec
    device: torch.device
    dtype: str
    weights: dict[str, torch.Tensor]
    peer: Any

    @classmethod
    def make(cls, spec: ModelSpec, device: torch.device, dtype: str) -> Stage:
        """Random weights, made where they are used."""
        torch.manual_seed(SEED)
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            with device:
                peer = _peer_model(spec)
        finally:
            torch.set_default_dtype(before)
        peer.eval()
        state = peer.state_dict()
        weights = {}
        for recipe in image_recipes(spec):
            sources = [state[source] for source in recipe.sources]
            weights[recipe.name] = sources[0] if len(sources) == 1 else torch.cat(sources)
        return cls(spec, device, dtype, weights, peer)

    def prompts(self, lengths: Sequence[int], seed: int = SEED) -> Tokens:
        """Random tokens."""
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randint(0, self.spec.vocabulary, (length,), generator=generator).tolist()
            for length in lengths
        ]

    @contextlib.contextmanager
    def engine(self, limits: EngineLimits, kv_tokens: int) -> Iterator[Engine]:
        """An engine with KV for so many tokens, over memory such as a worker has."""
        with self.kv_space(kv_tokens) as space:
            graphs = CudaGraphs() if self.device.type == "cuda" else None
            engine = Engine(
                self.spec,
                self.weights,
                space,
                limits,
                dtype=self.dtype,
                make_stepper=partial(choose_stepper, graphs=graphs),
            )
            yield engine
            del engine

    @contextlib.contextmanager
    def kv_space(self, kv_tokens: int) -> Iterator[KvSpace]:
        """KV memory for so many tokens and some blocks of each request begun."""
        cuda = self.device.type == "cuda"
        page_bytes = PAGE_BYTES if cuda else HOST_PAGE_BYTES
        layout = KvLayout.choose(self.spec, self.dtype, page_bytes)
        pages = layout.pages_for(kv_tokens)
        if not cuda:
            yield PlainKvSpace(page_bytes, pages)
            return
        torch.cuda.empty_cache()  # what transformers used before is for the engine's KV now
        memory = CudaDevice(pages * page_bytes, page_bytes=page_bytes)
        region = Region(PagePool(memory), "KV", pages * page_bytes)
        try:
            yield RegionKvSpace(region)
        finally:
            torch.cuda.synchronize()
            region.release()
            memory.close()

    def run_peer(self, prompts: Tokens, new_tokens: Sequence[int], batch_tokens: int) -> Run:
        """All prompts at once through `generate_batch`, each to its own length.

        Raises what transformers raises.
        """
        generation = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(new_tokens), do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        wanted = sum(
            -(-(len(prompt) + count) // PEER_PAGE_TOKENS) + 1
            for prompt, count in zip(prompts, new_tokens, strict=True)
        )
        batching = ContinuousBatchingConfig(
            page_size=PEER_PAGE_TOKENS,
            num_blocks=min(wanted, KV_TOKENS_MAX // PEER_PAGE_TOKENS),
            max_batch_tokens=batch_tokens,
            allow_block_sharing=False,
            use_cuda_graph=None if self.device.type == "cuda" else False,
        )
        hints = WorkloadHints(
            max_prompt_length=max(map(len, prompts)),
            max_generated_length=max(new_tokens),
            num_requests=len(prompts),
        )
        # What `generate_batch` does, but with a length for each request: it has one for all.
        with (
            torch.no_grad(),
            self.peer.continuous_batching_context_manager(
                generation_config=generation,
                continuous_batching_config=batching,
                workload_hints=hints,
                timeout=PEER_END_TIMEOUT_S,
                warmup=self.device.type == "cuda",
            ) as manager,
        ):
            return _through(manager, prompts, new_tokens)


def run_engine(engine: Engine, prompts: Tokens, new_tokens: Sequence[int]) -> Run:
    """All prompts at once through the engine, greedily, each to its own length.

    Raises RuntimeError when a request ends with an error.
    """
    started = time.perf_counter()
    for number, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True)):
        sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
        engine.submit(number, prompt, sampling)
    tokens: Tokens = [[] for _ in prompts]
    first_token_s = [0.0] * len(prompts)
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            if output.error:
                raise RuntimeError(f"request {output.request}: {output.error}")
            if not tokens[output.request]:
                first_token_s[output.request] = now
            tokens[output.request] += output.tokens
    return Run(tokens, time.perf_counter() - started, tuple(first_token_s))


def _through(manager: Any, prompts: Tokens, new_tokens: Sequence[int]) -> Run:
    """Prompts through a manager that has started."""
    started = time.perf_counter()
    numbers = {
        manager.add_request(prompt, max_new_tokens=count): number
        for number, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True))
    }
    tokens: Tokens = [[] for _ in prompts]
    left = len(prompts)
    while left:
        result = manager.get_result(timeout=PEER_LOOK_S)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended by itself; see above")
        elif result.error is not None:
            raise RuntimeError(f"transformers' continuous batching: {result.error}")
        elif result.is_finished():
            tokens[numbers[result.request_id]] = list(result.generated_tokens)
            left -= 1
    return Run(tokens, time.perf_counter() - started)


def _peer_model(spec: ModelSpec) -> Any:
    values: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.context_tokens,
        "rms_norm_eps": spec.norm_epsilon,
        "tie_word_embeddings": spec.tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta},
        "initializer_range": 0.06,
        "attn_implementation": "sdpa",
    }
    if spec.family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**values))
    return LlamaForCausalLM(LlamaConfig(**values))


def arguments(program: str, models: Sequence[str], default: str) -> argparse.ArgumentParser:
    """The options that the engine's benchmarks have in common."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=models, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2, help="of the processor")
    parser.add_argument("--fake", action="store_true", help="dry run: a tiny shape, no GPU")
    parser.add_argument("--output", type=Path)
    return parser


def stage_of(options: argparse.Namespace, context_tokens: int) -> Stage:
    """The model that the options name, where they say; a dry run's is tiny."""
    torch.set_num_threads(options.threads)
    device = torch.device("cpu" if options.fake else options.device)
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    spec = spec_of(options.model, context_tokens, tiny=options.fake)
    return Stage.make(spec, device, dtype)
