"""What a worker tells of one model on it.

Owns the translation of a resident and its engine's figures into the link's words, and keeps
nothing. Invariant: a model that FAILED holds nothing and runs nothing, whatever its engine had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.link.control import EngineState, EngineStatus

if TYPE_CHECKING:
    from engine.worker.resident import Resident


def state_of(resident: Resident, kv_bytes: int) -> EngineState:
    """The state of a resident whose KV pages in use or promised have `kv_bytes`."""
    figures = resident.engine.statistics()
    failed = resident.status is EngineStatus.FAILED
    # A paused engine runs nothing: what keeps its KV waits like the rest.
    paused = figures.running if resident.engine.paused else 0
    return EngineState(
        model=resident.model,
        digest=resident.image.digest,
        status=resident.status,
        weights_bytes=resident.weights.mapped_bytes,
        kv_used_bytes=0 if failed else figures.kv_used_bytes,
        kv_bytes=0 if failed else kv_bytes,
        cached_bytes=0 if failed else figures.cached_bytes,
        running=0 if failed else figures.running - paused,
        waiting=0 if failed else figures.waiting + paused,
        paused=0 if failed else paused,
        parked=0 if failed else figures.parked,
        parked_bytes=0 if failed else figures.parked_bytes,
        prompt_tokens_total=figures.prompt_tokens_total,
        generation_tokens_total=figures.generation_tokens_total,
        computed_tokens_total=figures.computed_tokens_total,
        prefix_lookup_tokens_total=figures.prefix_lookup_tokens_total,
        prefix_hit_tokens_total=figures.prefix_hit_tokens_total,
        preemptions_total=figures.preemptions_total,
        preemptions_parked_total=figures.preemptions_parked_total,
        graphs=figures.stepper.graphs,
        graph_bytes=figures.stepper.graph_bytes,
        graph_replays_total=figures.stepper.replays,
        graph_capture_seconds_total=figures.stepper.capture_s,
        reason=resident.reason,
        spare=resident.spare,
        staged_bytes=resident.weights.staged_bytes if resident.spare else 0,
        copy_bytes=resident.weights.copy_bytes if resident.spare else 0,
    )
