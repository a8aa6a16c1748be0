"""What an engine tells of itself: frozen figures, for the worker's state and metrics.

Owns their meaning alone. Invariant: totals never fall while the engine lives.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.stepper import StepperStatistics


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What an engine holds now and did since it was made."""

    running: int
    waiting: int
    kv_used_bytes: int
    """Of blocks that requests hold."""
    kv_bytes: int
    """Of pages in use now: those behind them hold cached prefixes or nothing."""
    cached_bytes: int
    """Of blocks that only keep prefixes."""
    prompt_tokens_total: int
    """Tokens of prompts whose computation was begun; doing it again does not count."""
    generation_tokens_total: int
    computed_tokens_total: int
    """Tokens that went through the model; doing it again does count."""
    prefix_lookup_tokens_total: int
    """Prompt tokens looked for in the prefix cache, each prompt once."""
    prefix_hit_tokens_total: int
    """Of those, what was found and not computed."""
    preemptions_total: int
    preemptions_parked_total: int
    """Of those, for how many KV was parked; the others compute it again."""
    steps_total: int
    parked: int
    """Waiting requests whose KV is in host memory."""
    parked_bytes: int
    unparked_s: float
    """Time spent on bringing KV back since it was made."""
    discarded_tokens_total: int
    """Drawn for requests that had ended by then, and never sent."""
    stepper: StepperStatistics
