"""The step loop: the one thread that owns every engine and every page.

Owns the order of work: mail first, then the jobs (the exchange, drains), then one step of the
engine whose turn it is. It never touches a socket. It sleeps when nothing can be done and is woken
by mail, by the end of a copy, or at the time a job named; it never polls. Invariant: one engine's
exception ends that engine and nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from engine.link.control import Drain, ExchangeResult, InFlight
from engine.link.tokens import Output
from engine.worker.copying import Waits
from engine.worker.desk import Desk
from engine.worker.drain import DrainCounts, drain
from engine.worker.errors import OperationInProgress
from engine.worker.exchange import Exchange
from engine.worker.failpoints import FailPoints
from engine.worker.garbage import Garbage
from engine.worker.mailbox import Mailbox, promise
from engine.worker.order import Order
from engine.worker.residency import Residency
from engine.worker.resident import Resident
from engine.worker.snapshot import Snapshot, take_snapshot
from engine.worker.staging import Staging
from engine.worker.turns import Turns
from swap.errors import SwapError

SNAPSHOT_INTERVAL_S = 0.2
"""A loop that never sleeps tells its state this often; before it sleeps it always does."""
JOBS_MAX = 16

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass
class _Job:
    steps: Waits
    settles: bool
    """Whether it may take an engine's KV or weights: then no step may be under way."""
    resume_at: float | None = None


class StepLoop:
    """The step thread. `start`, `join`, `call`, `mailbox` and `snapshot` are for any thread; all
    else runs on the thread itself, by way of `call`.

    `changed` is called when a status or an exchange changed, `crashed(error)` when a bug ends the
    loop.
    """

    def __init__(
        self,
        residency: Residency,
        desk: Desk,
        failpoints: FailPoints,
        *,
        changed: Callable[[], None],
        crashed: Callable[[BaseException], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mailbox = Mailbox()
        self.snapshot: Snapshot = take_snapshot(residency, "", None)
        self._residency = residency
        self._desk = desk
        self._failpoints = failpoints
        self._changed = changed
        self._crashed = crashed
        self._clock = clock
        self._turns = Turns()
        self._garbage = Garbage()
        self._jobs: list[_Job] = []
        self._exchange: Exchange | None = None
        self._staging: Staging | None = None
        self._exchanged: ExchangeResult | None = None
        self._awaited: Exchange | None = None
        """A committed exchange whose incoming model has sent no token yet."""
        self._told_at = clock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="step loop", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait for the loop's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have the loop call `function`; the future has what it returns or raises.

        The snapshot is of afterwards by the time the future is done.
        """
        future: Future[Result] = promise()

        def answer() -> None:
            try:
                result = function()
            except Exception as error:
                future.set_exception(error)
            else:
                self._tell()
                future.set_result(result)

        self.mailbox.post(answer)
        return future

    # Jobs.

    def exchange(self, order: Order) -> None:
        """Begin an exchange; its outcome goes to `order.done`. One at a time."""
        if self._exchange is not None:
            order.done.set_exception(
                OperationInProgress(
                    f"exchange {self._exchange.order.request.operation} is under way; wait for it",
                    operation=self._exchange.order.request.operation,
                )
            )
            return
        exchange = Exchange(
            order, self._residency, self._desk, self._failpoints, self.mailbox.wake, self._clock
        )
        if self._begin(self._run_exchange(exchange), order.done):
            self._exchange, self._awaited = exchange, None
            if self._staging is not None:
                self._staging.pause(True)
            self._tell()

    def _run_exchange(self, exchange: Exchange) -> Waits:
        done = exchange.order.done
        try:
            result = yield from exchange.run()
        except Exception as error:  # refused, and nothing was changed
            self._exchanging_ended()
            self._tell()
            done.set_exception(error)
            return
        self._exchanging_ended()
        self._exchanged = result
        if not result.error and result.ledger.first_token_ms is None:
            self._awaited = exchange
        # Told first: whoever hears of the end and then asks must find it ended.
        self._tell()
        done.set_result(result)

    def _exchanging_ended(self) -> None:
        self._exchange = None
        if self._staging is not None:
            self._staging.pause(False)

    def stage(self, order: Order, displace: bool, bytes_max: int = 0) -> None:
        """Begin to stage `order.request.incoming`; the outcome goes to `order.done`. One at a
        time."""
        if self._staging is not None:
            operation = self._staging.order.request.operation
            order.done.set_exception(
                OperationInProgress(
                    f"{operation} is staging a model; wait for it", operation=operation
                )
            )
            return
        staging = Staging(
            order,
            self._residency,
            self.mailbox.wake,
            displace=displace,
            bytes_max=bytes_max,
            failpoints=self._failpoints,
        )
        staging.pause(self._exchange is not None)
        if self._begin(self._run_staging(staging), order.done, settles=False):
            self._staging = staging

    def _run_staging(self, staging: Staging) -> Waits:
        done = staging.order.done
        try:
            result = yield from staging.run()
        except Exception as error:  # refused, and nothing was changed
            self._staging = None
            done.set_exception(error)
            return
        self._staging = None
        self._tell()
        done.set_result(result)

    def drain(self, request: Drain) -> Future[None]:
        """Bring a model to STAGED; the future is done when nothing of it runs."""
        done: Future[None] = promise()
        resident = self._residency.to_drain(request.model)
        self._begin(self._run_drain(resident, request, done), done)
        return done

    def _run_drain(self, resident: Resident, request: Drain, done: Future[None]) -> Waits:
        resident.claimed = True
        try:
            yield from drain(
                [resident],
                request.in_flight,
                request.drain_timeout_s,
                self._desk,
                self._clock,
                DrainCounts(),
            )
        finally:
            resident.claimed = False
        self._tell()
        done.set_result(None)

    def shut_down(self, drain_timeout_s: float) -> Future[None]:
        """Finish what runs, answer the rest, and end the loop."""
        done: Future[None] = promise()
        self._begin(self._run_shutdown(drain_timeout_s, done), done)
        return done

    def _run_shutdown(self, drain_timeout_s: float, done: Future[None]) -> Waits:
        self._residency.closing = True
        residents = list(self._residency.residents.values())
        yield from drain(
            residents, InFlight.DRAIN, drain_timeout_s, self._desk, self._clock, DrainCounts()
        )
        self._residency.answer_all("the worker was shut down")
        self._stopped = True
        done.set_result(None)

    def _begin(self, steps: Waits, done: Future[Result], *, settles: bool = True) -> bool:
        """Have a job run from the loop's next turn on; whether there was room for it, which `done`
        is told otherwise."""
        if len(self._jobs) >= JOBS_MAX:
            done.set_exception(OperationInProgress(f"{JOBS_MAX} calls are under way; wait"))
            return False
        self._jobs.append(_Job(_reporting(steps, done), settles))
        return True

    # The thread.

    def _run(self) -> None:
        try:
            busy = False
            while not self._stopped:
                if not busy or self._clock() >= self._told_at + SNAPSHOT_INTERVAL_S:
                    self._tell()
                if not busy and not self._jobs:
                    self._garbage.collect()
                self.mailbox.wait(0.0 if busy else self._sleep_s())
                for mail in self.mailbox.take():
                    mail()
                self._resume_jobs()
                self._desk.flush()
                busy = self._step_one()
            self._tell()
        except BaseException as error:
            log.critical("the step loop ended by a bug", exc_info=error)
            self._crashed(error)

    def _sleep_s(self) -> float | None:
        times = [job.resume_at for job in self._jobs if job.resume_at is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def _resume_jobs(self) -> None:
        if any(job.settles for job in self._jobs):
            for resident in list(self._residency.residents.values()):
                self._send_from(resident, resident.engine.settle)
        for job in list(self._jobs):
            try:
                job.resume_at = next(job.steps)
            except StopIteration:
                self._jobs.remove(job)
                self._garbage.left()

    def _tell(self) -> None:
        before = self.snapshot.outline
        exchanging = self._exchange.order.request.operation if self._exchange else ""
        self.snapshot = take_snapshot(self._residency, exchanging, self._exchanged)
        self._told_at = self._clock()
        if self.snapshot.outline != before:
            self._changed()

    # Stepping.

    def _step_one(self) -> bool:
        """A step of the engine whose turn it is; whether there was any."""
        ready = [one for one in self._residency.residents.values() if one.can_step]
        if not ready or not self._desk.open:
            return False
        # An engine that is still being copied blocks the loop at its first missing layer, which
        # is what brings its first token early, but must not hold up others that have work.
        landed = {one.model: one for one in ready if not one.landing}
        if not landed and len(ready) > 1:
            return False
        if not landed:
            # What it waits for its weights is no time that it owes others.
            self._step(ready[0])
            return True
        resident = landed[self._turns.choose(landed)]
        started = self._clock()
        self._step(resident)
        self._turns.count(resident.model, self._clock() - started, resident.spec.weight)
        return True

    def _step(self, resident: Resident) -> None:
        self._send_from(resident, resident.engine.step)

    def _send_from(self, resident: Resident, source: Callable[[], list[Output]]) -> None:
        """Send what an engine has to say; its exception ends that engine alone."""
        try:
            outputs = source()
        except Exception as error:
            log.exception("a step of %s failed", resident.model)
            if resident.unverified and self._exchange is not None:
                # Weights that did not come are the copy's failure, anything else the engine's.
                if resident is self._exchange.incoming and not isinstance(error, SwapError):
                    self._exchange.damaged = True
                self._exchange.order.interrupt(error)
            else:
                self._residency.fail(resident, error)
            return
        if resident.unverified:
            resident.held += outputs
            return
        awaited = self._awaited
        if awaited is not None and awaited.incoming is resident and awaited.journal.sent(outputs):
            self._exchanged, self._awaited = awaited.journal.result(), None
        if outputs:
            self._desk.deliver(outputs)


def _reporting(steps: Waits, done: Future[Result]) -> Waits:
    """Run a job; what escapes it is a bug, which its caller must hear of rather than wait."""
    try:
        yield from steps
    except Exception as error:
        log.exception("a job failed")
        if not done.done():
            done.set_exception(error)
