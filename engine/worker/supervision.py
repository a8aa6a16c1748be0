"""Watching over an exchange from outside the step thread.

Owns the telling of its progress and the deadlines of its stages; it never touches an engine or a
page. Invariant: no stage outlasts its deadline by more than one look: it is interrupted, and the
exchange rolls back. Where the interruption is not heard for as long again, a call to the device
does not return: nothing in the process can be trusted then, and it must end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from engine.link.control import Stage, StageReached
from engine.worker.errors import StageTimedOut
from engine.worker.order import Order

PROGRESS_INTERVAL_S = 0.1
COPY_SLACK = 4.0
"""A copy may take this many times as long as the measured link lets expect."""
UNHEARD_S_MIN = 10.0
"""How long at least an interruption may go unheard: a step of another engine may have to end."""


def stage_deadline_s(order: Order, stage_timeout_s: float, link_bytes_per_s: float) -> float:
    """How long the present stage may take, in seconds."""
    if order.stage is Stage.DRAINING:
        return order.request.drain_timeout_s + stage_timeout_s
    if order.stage in (Stage.COPYING, Stage.ROLLING_BACK) and link_bytes_per_s > 0:
        return stage_timeout_s + COPY_SLACK * order.progress().bytes_total / link_bytes_per_s
    return stage_timeout_s


async def supervise(
    order: Order,
    stage_timeout_s: float,
    link_bytes_per_s: float,
    tell: Callable[[StageReached], None],
    wake: Callable[[], None],
    stuck: Callable[[StageTimedOut], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Tell progress and enforce deadlines until the exchange has ended, or `stuck` was called."""
    done = asyncio.wrap_future(order.done)
    told = order.progress()
    interrupted, unheard_at = -1.0, 0.0
    """When the stage was entered that has been interrupted, and until when it may not hear that."""
    while True:
        await asyncio.wait({done}, timeout=PROGRESS_INTERVAL_S)
        if order.done.done():
            return
        progress = order.progress()
        if progress != told:
            told = progress
            tell(progress)
        limit_s = stage_deadline_s(order, stage_timeout_s, link_bytes_per_s)
        now = clock()
        if now <= order.entered + limit_s:
            continue
        error = StageTimedOut(
            f"{order.stage} of exchange {order.request.operation} took over {limit_s:g} s: "
            "see the worker's log, or allow it more time",
            stage=order.stage,
            limit_s=f"{limit_s:g}",
        )
        if interrupted != order.entered:
            interrupted, unheard_at = order.entered, now + max(limit_s, UNHEARD_S_MIN)
            if order.interrupt(error):
                wake()
        elif now > unheard_at:
            stuck(error)
            return
