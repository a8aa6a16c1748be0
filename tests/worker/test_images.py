"""Images on a worker whose host does not let memory be pinned: refused, or copied slowly."""

from __future__ import annotations

import os

import pytest

from engine.worker.images import Image
from swap.arena import PagePool, Region
from swap.errors import CorruptWeights, DeviceError
from swap.segment import Segment
from swap.transfer import Transfer
from swap.virtual_memory import view_of
from tests.support.devices import FAKE, device_factory
from tests.worker.conftest import Model

PAGE = 2 << 20


@pytest.fixture
def device():
    with device_factory(FAKE) as make:
        yield make(8)


def attach(device, model: Model, **options):
    segment = model.image.segment
    return Image.attach(device, os.dup(segment.descriptor), model.image.digest, **options)


def test_an_image_is_pinned_whole_and_unpinned_when_it_is_closed(device, prose: Model) -> None:
    image = attach(device, prose)
    assert image.pageable_bytes == 0
    assert device._driver.holdings()["registrations"] == 1
    image.close()
    assert device._driver.holdings()["registrations"] == 0


@pytest.mark.parametrize("pinned", [0, 1])
def test_what_cannot_be_pinned_is_copied_all_the_same_or_refused(
    device, prose: Model, monkeypatch, caplog, pinned
) -> None:
    size_bytes = prose.image.segment.size_bytes
    chunk = size_bytes // 2 // 4096 * 4096
    monkeypatch.setattr("engine.worker.images.REGISTER_BYTES_MAX", chunk)
    driver = device._driver
    register, calls = driver.host_register, []

    def refuse_later(address, count, *, read_only):
        calls.append(address)
        driver.refuse.register = len(calls) > pinned
        register(address, count, read_only=read_only)

    driver.host_register = refuse_later
    with pytest.raises(DeviceError, match="RLIMIT_MEMLOCK"):
        attach(device, prose, must_be_pinned=True)
    assert driver.holdings()["registrations"] == 0
    calls.clear()
    image = attach(device, prose)
    assert image.pageable_bytes == size_bytes - pinned * chunk
    assert "LimitMEMLOCK=infinity" in caplog.text
    pool = PagePool(device)
    region = Region(pool, "weights", image.manifest.weights_bytes)
    region.grow(region.pages_max)
    transfer = Transfer(device, image.manifest, image.source, region)
    transfer.start()
    transfer.join()
    weights_bytes = image.manifest.weights_bytes
    arrived = bytes(view_of(region.address, weights_bytes))
    assert arrived == bytes(image.source.view(0, weights_bytes))
    region.release()
    image.close()


def test_a_segment_of_another_image_is_refused(device, prose: Model, code: Model) -> None:
    with pytest.raises(CorruptWeights, match="holds image"):
        Image.attach(device, os.dup(prose.image.segment.descriptor), code.image.digest)
    with Segment.create(PAGE, "empty") as empty, pytest.raises(CorruptWeights, match="sealed"):
        Image.attach(device, os.dup(empty.descriptor), code.image.digest)
