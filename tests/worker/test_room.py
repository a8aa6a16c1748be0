"""Pages that change hands: as many as were asked for, and none for what is refused."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from engine.link.control import EngineStatus
from swap.errors import DeviceError, InsufficientDeviceMemory
from tests.worker.conftest import Model
from tests.worker.preserving import TOKENS_PER_PAGE, Bench

MIB = 1 << 20


def test_no_kv_is_parked_while_cached_prefixes_are_enough(
    bench: Callable[..., Bench], poem: Model, tale: Model
) -> None:
    one = bench(24, 64 * MIB)
    one.swap(None, poem)
    one.submit(poem, [1, *range(TOKENS_PER_PAGE)], 10)
    second = one.submit(poem, [2, *range(3 * TOKENS_PER_PAGE)], 10)
    one.step(6)
    assert one.swap(poem, tale).ledger.parked_bytes == 0
    one.residency.room.release_unused()
    one.cancel(second)
    paused = one.resident(poem)
    cached = paused.pages_kept - paused.engine.pages_held
    assert cached > 1
    kept, free = paused.pages_kept, one.pool.free_pages
    one.residency.room.reclaim(cached)
    assert (paused.pages_kept, one.pool.free_pages) == (kept - cached, free + cached)
    assert one.area_bytes == 0
    one.residency.room.reclaim(1)
    assert one.area_bytes > 0
    one.finish()


def test_a_staging_that_is_refused_makes_and_unmakes_nothing(
    bench: Callable[..., Bench], poem: Model, tale: Model, prose: Model
) -> None:
    one = bench(8, 64 * MIB)
    one.swap(None, poem)
    one.submit(poem, list(range(70)), 20)
    one.step(6)
    one.swap(poem, tale)
    there = one.resident(poem)
    assert there.engine.waiting == 1
    # As if it was loaded with other limits than it is to be staged with.
    spec = there.spec
    there.spec = msgspec.structs.replace(spec, context_tokens=spec.context_tokens - 1)
    one.residency.room.release_unused()
    held = one.pool.take("others", one.pool.free_pages)
    for model in (poem, prose):
        with pytest.raises(InsufficientDeviceMemory):
            one.stage(model)
    one.pool.give_back("others", held)
    assert one.residency.residents == {poem.key: there, tale.key: one.resident(tale)}
    there.spec = spec
    one.finish()


def test_a_staging_that_breaks_as_it_takes_pages_claims_none(
    bench: Callable[..., Bench], poem: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise DeviceError("no memory left")

    one = bench(12, 0)
    with monkeypatch.context() as patched:
        patched.setattr(one.device, "map", refuse)
        with pytest.raises(DeviceError, match="no memory left"):
            one.stage(poem)
    assert one.residency.residents == {}
    one.swap(None, poem)
    one.swap(poem, None)
    there = one.resident(poem)
    with monkeypatch.context() as patched:
        patched.setattr(one.residency.room, "drop_spares", refuse)
        with pytest.raises(DeviceError, match="no memory left"):
            one.stage(poem)
    assert (one.resident(poem), there.status) == (there, EngineStatus.STANDBY)
    assert not there.claimed
    assert one.stage(poem).error == ""
    one.finish()
