"""A step loop within the test's process, over a slow link."""

from __future__ import annotations

import os
from concurrent.futures import Future

from engine.link import control
from engine.link.control import EngineStatus, ExchangeResult
from engine.link.tokens import Output, Step, Submit
from engine.worker.desk import Desk
from engine.worker.failpoints import FailPoints
from engine.worker.images import Image
from engine.worker.loop import StepLoop
from engine.worker.order import Order
from engine.worker.residency import Residency
from swap.arena import PagePool
from swap.host_device import HostDevice
from tests.support.worker_stage import greedy
from tests.worker.conftest import Model

PROMPT = [5, 9, 101, 44, 7]
WAIT_S = 120.0


class Inside:
    """A step loop within the test's process, whose engines can be made to fail."""

    def __init__(self, models: list[Model]) -> None:
        # A link so slow that steps are taken behind every copy.
        rate = models[0].image.manifest.weights_bytes / 0.1
        self.device = HostDevice(12 * (2 << 20), link_bytes_per_s=rate)
        self.outputs: dict[int, list[Output]] = {}
        self.ended: dict[int, Future[Output]] = {}
        self.crashes: list[BaseException] = []
        self.desk = Desk(self._sent, self.crashes.append)
        self.residency = Residency(PagePool(self.device), self.desk, step_tokens=64)
        self.loop = StepLoop(
            self.residency,
            self.desk,
            FailPoints({}),
            changed=lambda: None,
            crashed=self.crashes.append,
        )
        for model in models:
            descriptor = os.dup(model.image.segment.descriptor)
            self.residency.attach(Image.attach(self.device, descriptor, model.image.digest))
        self.desk.opened(1)
        self.loop.start()

    def _sent(self, link: int, step: Step) -> None:
        for output in step.outputs:
            self.outputs[output.request].append(output)
            if output.finish is not None:
                self.ended[output.request].set_result(output)
        self.desk.grant(1)

    def submit(self, number: int, model: str, count: int) -> None:
        self.outputs[number], self.ended[number] = [], Future()

        def take() -> None:
            assert self.desk.enter(number, model)
            self.residency.submit(Submit(number, model, tuple(PROMPT), greedy(count)))

        self.loop.call(take).result(WAIT_S)

    def end_of(self, number: int) -> Output:
        return self.ended[number].result(WAIT_S)

    def tokens(self, number: int) -> list[int]:
        return [token for output in self.outputs[number] for token in output.tokens]

    def exchange(self, request: control.Exchange) -> ExchangeResult:
        order = Order(request, lambda stage: None)
        self.loop.mailbox.post(lambda: self.loop.exchange(order))
        return order.done.result(WAIT_S)

    def stage(self, request: control.Exchange) -> ExchangeResult:
        order = Order(request, lambda stage: None)
        self.loop.mailbox.post(lambda: self.loop.stage(order, displace=False))
        return order.done.result(WAIT_S)

    def statuses(self) -> dict[str, EngineStatus]:
        return {one.model: one.status for one in self.loop.snapshot.engines}

    def close(self) -> None:
        done = self.loop.call(lambda: self.loop.shut_down(0.0)).result(WAIT_S)
        done.result(WAIT_S)
        assert self.loop.join(WAIT_S)
        for resident in list(self.residency.residents.values()):
            resident.evict()
            self.residency.discard(resident)
        assert self.residency.pool.free_pages == self.residency.pool.total_pages
        for image in self.residency.images.values():
            image.close()
        self.device.close()
        assert self.crashes == []
