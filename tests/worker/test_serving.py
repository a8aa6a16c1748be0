"""A worker that serves: real processes, real sockets, transformers as the oracle."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engine.link.control import EngineStatus, Exchange
from engine.link.tokens import Finish
from tests.support.worker_stage import greedy, load, worker_process
from tests.worker.conftest import Model

PROMPT = [5, 9, 101, 44, 7]


def test_two_models_take_turns_and_answer_as_the_oracle_does(
    runtime_dir: Path, prose: Model, code: Model
) -> None:
    async def run() -> None:
        async with worker_process(runtime_dir) as worker:
            hotbayd, gateway = await worker.hotbayd(), await worker.gateway()
            for model in (prose, code):
                await hotbayd.attach(model.image)
            result = await hotbayd.exchange(load(prose.key, prose.image))
            assert result.error == ""
            answer = await gateway.run(prose.key, PROMPT, greedy(12))
            assert (answer.tokens, answer.finish) == (prose.expected(PROMPT, 12), Finish.LENGTH)
            for number, (old, new) in enumerate([(prose, code), (code, prose), (prose, code)]):
                result = await hotbayd.exchange(
                    load(new.key, new.image, f"swap-{number}", outgoing=(old.key,))
                )
                assert (result.error, result.rolled_back) == ("", False)
                assert result.ledger.copied_bytes == new.image.manifest.weights_bytes
                assert result.ledger.evicted_bytes == old.image.manifest.weights_bytes
                answer = await gateway.run(new.key, PROMPT, greedy(12))
                assert answer.tokens == new.expected(PROMPT, 12)
                gone = await gateway.ended(gateway.submit(old.key, PROMPT, greedy(12)))
                assert (gone.finish, gone.tokens) == (Finish.REQUEUE, [])
            state = await hotbayd.describe()
            assert {one.model: one.status for one in state.engines} == {
                prose.key: EngineStatus.STANDBY,
                code.key: EngineStatus.ACTIVE,
            }
            unload = Exchange(operation="unload", outgoing=(code.key,), discard=True)
            assert (await hotbayd.exchange(unload)).error == ""
            state = await hotbayd.describe()
            assert [one.model for one in state.engines] == [prose.key]
            assert state.pages_free == state.pages_total

    asyncio.run(run())
