"""Models, versions, labels: the repository, registration, names."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from daemon.control.errors import ControlError, ProcessFailed, Refused
from daemon.control.state.failures import Failed
from daemon.control.state.journal import Contents, Put
from daemon.control.state.records import Label, Version
from daemon.control.state.registry import Registry
from engine.link.build import Inspected
from tests.support.control_builders import Builders


def checkpoint(root: Path, name: str, version: str = "1", bad: bool = False) -> Path:
    directory = root / name / version
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    if bad:
        (directory / "bad").touch()
    return directory


def make() -> tuple[Registry, Builders]:
    builders = Builders()
    return Registry(builders, "float32", 100), builders


def records(puts: list[Put]) -> list[Version]:
    versions = [put.record for put in puts]
    assert all(isinstance(each, Version) for each in versions)
    return versions  # type: ignore[return-value]


def scan(registry: Registry, root: Path) -> list[Version]:
    return records(asyncio.run(registry.scan(root)))


def test_repository_is_read_in_tritons_layout(tmp_path: Path) -> None:
    registry, _ = make()
    for name, version in (("prose", "1"), ("prose", "2"), ("code", "7")):
        checkpoint(tmp_path, name, version)
    checkpoint(tmp_path, "strange", "latest")
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").touch()
    changes = scan(registry, tmp_path)
    assert [each.key for each in changes] == ["code@7", "prose@1", "prose@2"]
    assert registry.names() == ["code", "prose"]
    facts = registry["prose@2"].facts
    assert facts is not None
    assert (facts.family, facts.weights_bytes) == ("llama", 1 << 20)


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    registry, builders = make()
    checkpoint(tmp_path, "prose")
    code = checkpoint(tmp_path, "code")
    first = scan(registry, tmp_path)
    restarted = Registry(builders, "float32", 100)
    restarted.restore(Contents(versions=tuple(first)))
    restarted.learn_digest("code@1", "d1")
    restarted.learn_digest("prose@1", "d2")
    builders.inspections.clear()
    assert scan(restarted, tmp_path) == []
    os.utime(code / "config.json", (1, 1))
    (changed,) = scan(restarted, tmp_path)
    assert builders.inspections == ["code"]
    assert (changed.key, changed.digest) == ("code@1", "")
    assert restarted["prose@1"].digest == "d2"


def test_dtype_is_part_of_what_was_read(tmp_path: Path) -> None:
    registry, builders = make()
    checkpoint(tmp_path, "prose")
    first = scan(registry, tmp_path)
    other = Registry(builders, "bfloat16", 100)
    other.restore(Contents(versions=tuple(first)))
    assert len(scan(other, tmp_path)) == 1
    assert scan(other, tmp_path) == []


def test_what_was_registered_is_read_again_for_another_dtype(tmp_path: Path) -> None:
    registry, builders = make()
    directory = checkpoint(tmp_path, "prose")
    registry.put(asyncio.run(registry.register("prose", directory, 0)))
    registry.learn_digest("prose@1", "of float32")
    contents = Contents(versions=tuple(registry.versions()))
    for repository in (None, tmp_path / "empty"):
        if repository is not None:
            repository.mkdir()
        other = Registry(builders, "bfloat16", 100)
        other.restore(contents)
        (again,) = records(asyncio.run(other.scan(repository)))
        assert (again.key, again.source, again.digest) == ("prose@1", "api", "")
        before = contents.versions[0].facts
        assert again.facts is not None
        assert before is not None
        assert again.facts.weights_bytes * 2 == before.weights_bytes
        assert asyncio.run(other.register("prose", directory, 1)) is again
        assert records(asyncio.run(other.scan(repository))) == []


def test_what_was_registered_and_cannot_be_read_now_stays_as_it_was(tmp_path: Path) -> None:
    registry, builders = make()
    directory = checkpoint(tmp_path, "prose")
    registry.put(asyncio.run(registry.register("prose", directory, 0)))
    registry.learn_digest("prose@1", "d")
    known = registry["prose@1"]
    (directory / "bad").touch()
    other = Registry(builders, "bfloat16", 100)
    other.restore(Contents(versions=(known,)))
    assert asyncio.run(other.scan(None)) == []
    assert other["prose@1"] == known


def test_bad_checkpoints_are_listed_with_the_reason_and_gone_ones_too(tmp_path: Path) -> None:
    registry, _ = make()
    checkpoint(tmp_path, "prose", bad=True)
    gone = checkpoint(tmp_path, "code")
    scan(registry, tmp_path)
    failure = registry["prose@1"].failure
    assert failure is not None
    assert (failure.reason, failure.message) == ("CHECKPOINT_INVALID", "tensor x is missing")
    (gone / "config.json").unlink()
    gone.rmdir()
    (changed,) = scan(registry, tmp_path)
    assert changed.failure is not None
    assert "put it back" in changed.failure.message
    checkpoint(tmp_path / "again", "code")
    gone.mkdir()
    (gone / "config.json").write_text("{}")
    scan(registry, tmp_path)
    assert registry["code@1"].failure is None


def test_inspector_that_dies_is_replaced_and_its_checkpoint_tried_again(tmp_path: Path) -> None:
    class Mortal(Builders):
        deaths = 1
        starts = 0

        @asynccontextmanager
        async def __call__(self) -> AsyncIterator[Builders]:
            self.starts += 1
            yield self

        async def inspect(self, directory: Path, dtype: str) -> Inspected:
            if directory.parent.name == "code" and self.deaths:
                self.deaths -= 1
                raise ProcessFailed("the image builder ended while it worked")
            return await super().inspect(directory, dtype)

    builders = Mortal()
    registry = Registry(builders, "float32", 100)
    checkpoint(tmp_path, "code")
    checkpoint(tmp_path, "prose")
    scan(registry, tmp_path)
    assert builders.starts == 2
    assert registry["code@1"].failure is not None
    assert registry["prose@1"].failure is None
    scan(registry, tmp_path)
    assert registry["code@1"].failure is None


def test_names_versions_and_labels_resolve(tmp_path: Path) -> None:
    registry, _ = make()
    for version in ("1", "2", "10"):
        checkpoint(tmp_path, "prose", version, bad=version == "10")
    scan(registry, tmp_path)
    assert registry.resolve("prose").key == "prose@2", "the newest that can be used"
    assert registry.resolve("prose@10").failure is not None
    registry.restore(Contents(labels=(Label("prose", "canary", 1),)))
    assert registry.resolve("prose@canary").key == "prose@1"
    registry.restore(Contents(labels=(Label("prose", "production", 1),)))
    assert registry.resolve("prose").key == "prose@1"
    assert registry.labels("prose") == {"canary": 1, "production": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pros", "did you mean prose"),
        ("xyzzy", "no model 'xyzzy'"),
        ("prose@9", "it has 1"),
        ("prose@gold", "no version or label 'gold'"),
        ("prose@-1", "no version or label"),
        ("", "no model ''"),
    ],
)
def test_what_is_not_there_is_not_found_and_hinted_at(tmp_path: Path, text: str, said: str) -> None:
    registry, _ = make()
    checkpoint(tmp_path, "prose")
    scan(registry, tmp_path)
    with pytest.raises(Refused, match=said) as refused:
        registry.resolve(text)
    assert refused.value.reason == "MODEL_NOT_FOUND"


def test_registration_counts_versions_and_recognises_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        registry, _ = make()
        one, two = checkpoint(tmp_path, "a"), checkpoint(tmp_path, "b")
        first = await registry.register("prose", one, 0)
        registry.put(first)
        assert (first.key, first.source) == ("prose@1", "api")
        assert await registry.register("prose", one, 0) is first
        assert await registry.register("prose", one, 1) is first
        second = await registry.register("prose", two, 0)
        registry.put(second)
        assert second.key == "prose@2"
        with pytest.raises(Refused) as refused:
            await registry.register("prose", two, 1)
        assert refused.value.reason == "MODEL_EXISTS"
        with pytest.raises(Failed) as failed:
            await registry.register("other", checkpoint(tmp_path, "c", bad=True), 0)
        assert failed.value.reason == "CHECKPOINT_INVALID"
        assert registry.get("other@1") is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("name", "directory", "version", "field"),
    [
        ("../etc", "/tmp", 0, "name"),
        (".hidden", "/tmp", 0, "name"),
        ("a" * 65, "/tmp", 0, "name"),
        ("a@1", "/tmp", 0, "name"),
        ("ok", "relative", 0, "directory"),
        ("ok", "/nowhere", 0, "directory"),
        ("ok", "/tmp", -1, "version"),
    ],
)
def test_nonsense_is_refused_by_field(name: str, directory: str, version: int, field: str) -> None:
    registry, builders = make()
    with pytest.raises(ControlError) as refused:
        asyncio.run(registry.register(name, Path(directory), version))
    assert refused.value.reason == "INVALID_ARGUMENT"
    assert refused.value.metadata == {"field": field}
    assert builders.inspections == []


def test_number_of_models_is_bounded(tmp_path: Path) -> None:
    registry = Registry(Builders(), "float32", 1)
    registry.put(asyncio.run(registry.register("a", checkpoint(tmp_path, "a"), 0)))
    with pytest.raises(Refused, match="models_max"):
        asyncio.run(registry.register("b", checkpoint(tmp_path, "b"), 0))


def test_digests_are_learnt_once(tmp_path: Path) -> None:
    registry, _ = make()
    checkpoint(tmp_path, "prose")
    scan(registry, tmp_path)
    assert len(registry.learn_digest("prose@1", "d")) == 1
    assert registry.learn_digest("prose@1", "d") == []
    assert registry.learn_digest("unknown@1", "d") == []
    assert registry.of_digest("d") == ["prose@1"]
