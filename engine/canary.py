"""The greedy continuation of one short prompt, apart from everything that an engine runs.

Owns KV of its own for as long as it lasts: it takes no page, no block and no place in a step from
any request, and leaves no trace. It never judges the tokens. Invariant: the same weights on the
same runtime (see `runtime_of`) give the same tokens whatever else is computed, since it is always
alone in its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from engine.device_tensors import placed
from engine.kernels.choose import choose_kernels
from engine.kernels.native.machine_code import describe
from engine.kernels.protocol import Span
from engine.kv_layout import BLOCK_TOKENS_MAX, KvLayout
from engine.models.decoder import Decoder, OpenGate, Weights
from engine.models.spec import ModelSpec


class Continuation:
    """A prompt and what follows it. Iterating computes one token each time; None is drawn from
    logits that are no numbers, and ends it.

    `weights` has the tensors that `image_recipes` names, of `dtype`, all there.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, dtype: str, prompt: Sequence[int], count: int
    ) -> None:
        self._count = count
        self._tokens = list(prompt)
        blocks = -(-(len(prompt) + count) // BLOCK_TOKENS_MAX)
        page_bytes = blocks * BLOCK_TOKENS_MAX * spec.kv_bytes_per_token(dtype)
        layout = KvLayout.choose(spec, dtype, page_bytes)
        self._blocks = tuple(range(layout.blocks_per_page))
        self._device = weights["embedding"].device
        memory = torch.zeros(page_bytes, dtype=torch.uint8, device=self._device)
        self._kernels = choose_kernels(spec, layout, memory)
        self._decoder = Decoder(spec, weights, self._kernels, OpenGate())

    def __iter__(self) -> Iterator[int | None]:
        computed = 0
        for _ in range(self._count):
            token = self._next(computed)
            yield token
            if token is None:
                return
            computed = len(self._tokens)
            self._tokens.append(token)

    @torch.inference_mode()
    def _next(self, computed: int) -> int | None:
        """Compute what is not yet, and return the likeliest token after it."""
        tokens = self._tokens[computed:]
        positions = torch.from_numpy(np.arange(computed, len(self._tokens)))
        plan = self._kernels.plan([Span(computed, len(tokens), self._blocks)], positions)
        rows = placed(torch.tensor([len(tokens) - 1]), self._device)
        logits = self._decoder.forward(placed(torch.tensor(tokens), self._device), plan, rows)
        row = logits[0].float().cpu().numpy()
        token = int(row.argmax())  # finds what is not a number before any number
        return token if np.isfinite(row[token]) else None


def runtime_of(device: torch.device, dtype: str) -> str:
    """What may change a result's last bits, and so, between nearly equal tokens, a choice."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        where = f"{found.name} {found.multi_processor_count} SM"
    else:
        capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        where = f"host {capability} {threads} threads {describe()}"
    return f"{where} torch {torch.__version__} {dtype}"
