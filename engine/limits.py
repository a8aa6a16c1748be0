"""The limits of one engine, validated once at start.

Owns the numbers and their ranges. Invariant: an `EngineLimits` that exists lets every running
request decode in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT_TOKENS_MAX = 1 << 24
STEP_TOKENS_MAX = 1 << 20
STRICT_STEP_TOKENS_MAX = 1024
"""In a strict engine each token attends by itself: as many decodes as one step can have."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of one engine. Raises ValueError when one is out of its range."""

    context_tokens: int
    """Longest prompt and output together of one request."""
    running_requests_max: int = 64
    waiting_requests_max: int = 4096
    step_tokens: int = 512
    """Tokens of prompts and decodes that one step computes at most."""
    prefix_cache: bool = True
    """Whether blocks that nobody holds are kept for prompts that begin with the same tokens."""
    fp8_kv: bool = False
    """Whether keys and values are stored as FP8 (see `engine.kernels.kv_scales`)."""
    strict: bool = False
    """Whether results are the same bit for bit in any company, at a cost (see
    `engine.kernels.strict`)."""

    @property
    def step_tokens_max(self) -> int:
        """What `step_tokens` may be."""
        return STRICT_STEP_TOKENS_MAX if self.strict else STEP_TOKENS_MAX

    def __post_init__(self) -> None:
        ranges = {
            "context_tokens": (2, CONTEXT_TOKENS_MAX),
            "running_requests_max": (1, 1 << 16),
            "waiting_requests_max": (1, 1 << 20),
            # Each running request may need one token of the budget to decode.
            "step_tokens": (self.running_requests_max, self.step_tokens_max),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be from {low} to {high}")
