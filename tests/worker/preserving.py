"""A worker's engines and exchanges in the test's own thread, and models with large KV.

One page holds 64 tokens of these models, so that a few requests take many pages. The test decides
when an engine steps and when an exchange goes on, in the order that its seed says; only copies run
beside it.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from engine.link.control import Canary, EngineStatus, ExchangeResult, InFlight
from engine.link.tokens import Finish, Step, Submit
from engine.worker.desk import Desk
from engine.worker.exchange import Exchange
from engine.worker.failpoints import Action, FailPoint
from engine.worker.images import Image
from engine.worker.order import Order
from engine.worker.residency import Residency
from engine.worker.resident import Resident
from engine.worker.staging import Staging
from swap.arena import PagePool
from swap.device import DeviceMemory
from swap.errors import InsufficientDeviceMemory, SwapError
from swap.host_device import HostDevice
from tests.engine.checkpoints import make_checkpoint
from tests.support.worker_stage import build_segment, greedy, load
from tests.worker.conftest import Model
from tests.worker.watched import Points, Sent

PAGE = 2 << 20
TOKENS_PER_PAGE = 64
ALONE_PAGES = 12
STEPS_MAX = 5_000


def make_large(key: str, directory: Path, shape: str, seed: int) -> Model:
    """A model whose KV takes 32 KiB a token: 3 pages of weights, at least 4 of KV."""
    changes = {
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    checkpoint = make_checkpoint(directory, shape, seed, **changes)
    return Model(key, checkpoint, build_segment(directory))


class PackedModel(Model):
    """A model whose image is packed, and so of bfloat16.

    What several requests compute together may round otherwise than one alone: its engines are
    strict, and its oracle is a strict engine alone, over the plain image of the same checkpoint.
    """

    @classmethod
    def of(cls, key: str, plain: Model) -> PackedModel:
        directory = Path(plain.checkpoint.directory)
        model = cls(key, plain.checkpoint, build_segment(directory, "bfloat16", 1 << 16))
        model._plain = Model(key, plain.checkpoint, build_segment(directory, "bfloat16"))
        model._known: dict[tuple[int, ...], list[int]] = {}
        return model

    def expected(self, prompt: list[int], count: int) -> list[int]:
        known = self._known.get(tuple(prompt), [])
        if len(known) < count:
            alone = Bench([self._plain], ALONE_PAGES, 0, strict=True)
            alone.swap(None, self._plain)
            sent = alone.sent[alone.submit(self._plain, prompt, count)]
            alone.run(lambda: not sent.open)
            alone.close()
            known = self._known[tuple(prompt)] = sent.tokens
        return known[:count]


class Bench:
    """A partition of `pages` pages. Every model is known to it and none is there yet."""

    def __init__(
        self,
        models: list[Model],
        pages: int,
        parking_bytes: int,
        *,
        link_bytes_per_s: float | None = None,
        draw: random.Random | None = None,
        strict: bool = False,
        device: DeviceMemory | None = None,
    ) -> None:
        self.models = {model.key: model for model in models}
        self.device = device or HostDevice(pages * PAGE, link_bytes_per_s=link_bytes_per_s)
        self.desk = Desk(self._collect, lambda link: None)
        self.pool = PagePool(self.device)
        self.giving_way: Callable[[], None] = lambda: None
        """What happens before KV of a request that gives way is parked."""
        ticks = itertools.count()
        self.residency = Residency(
            self.pool,
            self.desk,
            64,
            parking_bytes,
            # What is worth parking does not depend on this machine.
            clock=lambda: next(ticks) / 1000,
            strict=strict,
            giving_way=lambda: self.giving_way(),
        )
        for model in models:
            self.attach(model)
        self.desk.opened(1)
        self.sent: dict[int, Sent] = {}
        self._draw = draw or random.Random(0)
        self._woken = threading.Event()
        self._operations = 0

    def attach(self, model: Model) -> None:
        descriptor = os.dup(model.image.segment.descriptor)
        self.residency.attach(Image.attach(self.device, descriptor, model.image.digest))

    def detach(self, model: Model) -> None:
        image = self.residency.detach(model.image.digest)
        assert image is not None
        image.close()

    @property
    def area_bytes(self) -> int:
        return self.residency.area.used_bytes

    @property
    def gave_way(self) -> int:
        """How many times KV was parked because its request gave way, while its engine lives."""
        residents = self.residency.residents.values()
        return sum(one.state().preemptions_parked_total for one in residents)

    def resident(self, model: Model) -> Resident:
        return self.residency.residents[model.key]

    def active(self) -> list[str]:
        residents = self.residency.residents.values()
        return [one.model for one in residents if one.status is EngineStatus.ACTIVE]

    def staged(self) -> list[str]:
        """Models that have weights for only as long as nobody needs their pages."""
        return sorted(one.model for one in self.residency.residents.values() if one.spare)

    # Requests.

    def submit(self, model: Model, prompt: list[int], count: int) -> int:
        number = len(self.sent) + 1
        self.sent[number] = Sent(model, prompt, count)
        self._enter(number)
        return number

    def _enter(self, number: int) -> None:
        one = self.sent[number]
        assert self.desk.enter(number, one.model.key)
        tokens = tuple(one.prompt)
        self.residency.submit(Submit(number, one.model.key, tokens, greedy(one.count)))
        self.desk.flush()

    def resubmit(self) -> None:
        """What came back unstarted is sent again, as the gateway does."""
        for number, one in self.sent.items():
            if one.finish is Finish.REQUEUE and one.model.key in self.active():
                one.finish = None
                self._enter(number)

    def cancel(self, number: int) -> None:
        self.sent[number].cancelled = True
        self.residency.cancel(number)

    def _collect(self, link: int, step: Step) -> None:
        for output in step.outputs:
            one = self.sent[output.request]
            assert one.finish is None
            assert not one.cancelled
            one.tokens += output.tokens
            one.finish = output.finish
            ends = (None, Finish.LENGTH, Finish.REQUEUE, Finish.ABORT)
            assert output.finish in ends, output
            one.cancelled = output.finish is Finish.ABORT
        self.desk.grant(1)

    # Time.

    def step(self, count: int = 1) -> None:
        """So many turns of the step loop."""
        for _ in range(count):
            for resident in list(self.residency.residents.values()):
                if not resident.can_step:
                    continue
                try:
                    outputs = resident.engine.step()
                except SwapError as error:  # as the step loop does
                    assert resident.unverified
                    self._order.interrupt(error)
                    continue
                if resident.unverified:
                    resident.held += outputs
                else:
                    self.desk.deliver(outputs)

    def run(self, until: Callable[[], bool]) -> None:
        for _ in range(STEPS_MAX):
            if until():
                return
            self.step()
        raise AssertionError("that did not come")

    def swap(
        self,
        outgoing: Model | None,
        incoming: Model | None,
        in_flight: InFlight = InFlight.PRESERVE,
        *,
        fail_at: FailPoint | None = None,
        action: Action = Action.RAISE,
        canary: Canary | None = None,
        turns: int = 1,
        discard: bool = False,
        keep_staged: bool = False,
        during: Callable[[], None] = lambda: None,
    ) -> ExchangeResult:
        """An exchange to its end, with up to `turns` turns of the loop after each of its own.

        `during` is called once it has come to copying. Raises what it is refused with. What hangs
        at `fail_at` overruns its deadline at once.
        """
        self._operations += 1
        assert incoming is not None or outgoing is not None
        target = incoming or outgoing
        request = load(
            target.key,
            target.image,
            str(self._operations),
            outgoing=(outgoing.key,) if outgoing else (),
            in_flight=in_flight,
            drain_timeout_s=0.0,
            discard=discard,
            keep_staged=keep_staged,
        )
        if incoming is None:
            request = type(request)(
                operation=request.operation,
                outgoing=request.outgoing,
                in_flight=in_flight,
                drain_timeout_s=0.0,
                discard=discard,
            )
        request = msgspec.structs.replace(request, canary=canary)
        order = Order(request, lambda progress: None)
        self._order, self.points = order, Points(fail_at, action, order, during)
        points = self.points
        exchange = Exchange(order, self.residency, self.desk, points, self._woken.set, order._clock)
        return self._drive(exchange.run(), lambda: self.step(self._draw.randint(0, turns)))

    def stage(
        self,
        model: Model,
        *,
        displace: bool = False,
        bytes_max: int = 0,
        turns: int = 1,
        fail_at: FailPoint | None = None,
        action: Action = Action.RAISE,
    ) -> ExchangeResult:
        """A staging to its end (see `swap`). Raises what it is refused with."""
        self._operations += 1
        request = load(model.key, model.image, str(self._operations))
        order = Order(request, lambda progress: None)
        self.points = points = Points(fail_at, action, order)
        staging = Staging(
            order,
            self.residency,
            self._woken.set,
            displace=displace,
            bytes_max=bytes_max,
            failpoints=points,
        )
        return self._drive(staging.run(), lambda: self.step(self._draw.randint(0, turns)))

    def _drive(self, steps: Iterator[object], look: Callable[[], None]) -> ExchangeResult:
        """Run a job to its end; `look` is called whenever it waits."""
        while True:
            try:
                next(steps)
            except StopIteration as end:
                self.desk.flush()
                result: ExchangeResult = end.value
                return result
            self.check()
            look()
            self._woken.wait(0.01)
            self._woken.clear()

    # Accounts.

    def check(self) -> None:
        """Every page and every parked byte has its owner, and nobody is below what was promised."""
        owners = self.pool.owners()
        assert sum(owners.values()) + self.pool.free_pages == self.pool.total_pages
        residents = list(self.residency.residents.values())
        for resident in residents:
            resident.engine._pool.check()
            if resident.spare:
                assert resident.status in (EngineStatus.STAGED, EngineStatus.STANDBY)
                assert resident.weights.staged_bytes or resident.weights.transfer is not None
            elif resident.expected:
                assert resident.claimed  # its pages may still be coming
            elif resident.status in (EngineStatus.ACTIVE, EngineStatus.STAGED):
                assert resident.pages_missing == 0, resident.model
        if not any(one.claimed for one in residents):
            assert self.area_bytes == sum(one.state().parked_bytes for one in residents)
            assert set(owners) <= {
                f"{one.model} {what}" for one in residents for what in ("weights", "KV")
            }

    def finish(self) -> None:
        """Bring every model back until each request has its end, and compare; then unload all."""
        for model in self.models.values():
            if any(one.model is model and self._unanswered(one) for one in self.sent.values()):
                self._make_active(model)
                self.resubmit()
                self.run(lambda model=model: not self._left(model))
        for number, one in self.sent.items():
            assert one.cancelled or one.finish is Finish.LENGTH, (number, one)
            assert one.right, (number, one)
        self.check()
        assert self.area_bytes == 0
        for model in list(self.residency.residents):
            self.swap(self.models[model], None, discard=True)
        assert self.pool.free_pages == self.pool.total_pages
        assert self.device.statistics().pages_mapped == 0

    def _unanswered(self, one: Sent) -> bool:
        return not one.cancelled and one.finish is not Finish.LENGTH

    def _left(self, model: Model) -> int:
        return sum(self._unanswered(one) for one in self.sent.values() if one.model is model)

    def _make_active(self, model: Model) -> None:
        while model.key not in self.active():
            active = [self.models[key] for key in self.active()]
            # The large ones make room for any other.
            active.sort(key=lambda one: one.image.manifest.weights_bytes)
            outgoing = active[-1] if active else None
            try:
                result = self.swap(outgoing, model)
            except InsufficientDeviceMemory:
                assert len(active) > 1, "one model alone always fits"
                result = self.swap(outgoing, None)
            assert result.error == "", result.error

    def close(self) -> None:
        for resident in list(self.residency.residents.values()):
            resident.claimed = False
            resident.evict(keep_kv=False)
            self.residency.discard(resident)
        for image in self.residency.images.values():
            image.close()
        self.residency.area.close()
        self.device.close()
