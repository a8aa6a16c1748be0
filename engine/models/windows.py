"""How far back each layer of a model looks: the families' ways of saying so, read into one.

Owns the reading of `sliding_window` and of what turns it on; it refuses what the families do not
define. Invariant: a window that is kept is shorter than the context, so it does hide something.
"""

from __future__ import annotations

from engine.errors import ArchitectureUnsupported
from engine.models.fields import Fields

WINDOW_TOKENS = 4096
"""What an absent `sliding_window` means where windows are turned on."""
FULL_FROM_LAYER = 28
"""What an absent `max_window_layers` means: layers from this one on have the window."""
FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(config: Fields, family: str, layers: int) -> tuple[int, ...]:
    """Tokens that a query sees in each layer, its own included; 0 is all, and () all in every one.

    Raises CheckpointInvalid or ArchitectureUnsupported.
    """
    kinds = config.texts("layer_types")
    slides = [False] * layers
    if family == "mistral":
        slides = [config.values.get("sliding_window", WINDOW_TOKENS) is not None] * layers
    elif family != "llama" and config.boolean("use_sliding_window", False):
        first = config.integer("max_window_layers", FULL_FROM_LAYER, minimum=0)
        slides = [layer >= first for layer in range(layers)]
        if kinds and set(kinds) <= {FULL, SLIDING}:
            if len(kinds) != layers:
                raise config.invalid("layer_types", f"it must name each of {layers} layers")
            slides = [kind == SLIDING for kind in kinds]
    told = {SLIDING if slide else FULL for slide in slides}
    # What a family does not define, or contradicts, must not be guessed.
    if not set(kinds) <= told:
        raise ArchitectureUnsupported(
            f"{config.where}: layer_types is {str(list(kinds))[:80]}; layers of {family} with its "
            f"other settings are {' and '.join(sorted(told))}, and nothing else is supported",
            architecture=family,
            field="layer_types",
        )
    if not any(slides):
        return ()
    window = config.integer("sliding_window", WINDOW_TOKENS)
    if window >= config.integer("max_position_embeddings"):
        return ()
    return tuple(window if slide else 0 for slide in slides)
