"""Trying a model's canary, and finding out what it means when it fails.

Owns the comparison of its tokens with those recorded, and the full check of the host's copy that
follows other tokens. It never decides what becomes of the exchange. Invariant: while the host's
copy is read, the image says so, and is not unmapped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator

from engine.link.control import CANARY_PROMPT_TOKENS_MAX, Canary, CanaryRecord
from engine.models.spec import ModelSpec
from engine.worker.errors import CanaryFailed, OptionInvalid, WorkerError
from engine.worker.images import Image
from engine.worker.order import Order
from engine.worker.resident import Resident
from engine.worker.verify import verify_host
from swap.errors import SwapError
from swap.image import Manifest


def check_canary(canary: Canary, model: str, manifest: Manifest) -> None:
    """Raises OptionInvalid for a prompt that cannot be tried."""
    vocabulary = ModelSpec.from_dict(manifest.model).vocabulary
    prompt = canary.prompt
    if not 0 < len(prompt) <= CANARY_PROMPT_TOKENS_MAX:
        raise OptionInvalid(
            f"the canary of {model} has {len(prompt)} tokens: give it 1 to "
            f"{CANARY_PROMPT_TOKENS_MAX}"
        )
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        raise OptionInvalid(
            f"the canary of {model} holds a token outside its vocabulary of {vocabulary}"
        )


def try_canary(
    canary: Canary, resident: Resident, clock: Callable[[], float], check: Callable[[], None]
) -> Generator[float, None, CanaryRecord | None]:
    """Draw the canary's tokens, and let others step after each; `check` may end that by raising.

    The value is what is to be recorded, if nothing was before. Raises CanaryFailed.
    """
    runtime = resident.runtime
    tokens: list[int] = []
    expected = canary.expected.get(runtime)
    for token in resident.canary(canary.prompt):
        position = len(tokens)
        if token is None:
            raise CanaryFailed(
                f"the canary of {resident.model} failed: at position {position} the model's "
                "output is not a number",
                model=resident.model,
                position=position,
            )
        if expected is not None and (position >= len(expected) or expected[position] != token):
            known = expected[position] if position < len(expected) else "none"
            raise CanaryFailed(
                f"the canary of {resident.model} failed: at position {position} it drew token "
                f"{token}, and {known} when it was recorded",
                model=resident.model,
                position=position,
            )
        tokens.append(token)
        yield clock()
        check()
    return CanaryRecord(runtime, tuple(tokens)) if expected is None else None


def explained(
    error: CanaryFailed, image: Image, order: Order, wake: Callable[[], None]
) -> Generator[None, None, CanaryFailed]:
    """The error, with what a check of all of the host's copy says and what to do. The check ends
    at the stage's deadline, or when the exchange is abandoned."""
    stop, found = threading.Event(), _Finding()

    def read() -> None:
        try:
            complete = verify_host(image, stop)
            found.text = MATCHES if complete else UNCHECKED
        except SwapError as damage:
            found.text = f"the host's copy is damaged too ({damage}): {REBUILD}"
        finally:
            image.being_read = False
            found.ended = True
            wake()

    image.being_read = True
    threading.Thread(target=read, name="check of the host's copy", daemon=True).start()
    while not found.ended:
        yield None
        try:
            order.check()
        except WorkerError:
            stop.set()
    return CanaryFailed(f"{error}; {found.text}", **error.metadata)


MATCHES = (
    "the host's copy matches every checksum, so it is the device or the software that computes "
    "otherwise: look for memory errors of the GPU, and if the change is meant record anew by "
    "`gpuctl load MODEL --canary TEXT`"
)
UNCHECKED = "the host's copy was not checked in time: swap again, or record the canary anew"
REBUILD = "`gpuctl unload MODEL --evict`, load it again, and check the host's memory"


class _Finding:
    text = UNCHECKED
    ended = False
