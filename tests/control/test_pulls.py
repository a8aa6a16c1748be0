"""Pulls as hotbayd carries them out: durable, one at a time for a directory, within the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.control.config_file import load
from daemon.control.errors import CallRefused, ConfigInvalid, ControlError, ProcessFailed, Refused
from daemon.control.processes.puller_client import Puller
from daemon.control.state.records import Operation, Pulled, Stage
from daemon.control.state.running import Request
from engine.link.pull import Resolve
from tests.support.control_stage import Theatre, staged, until
from tests.support.pullers import COMMIT

SETTINGS = "[scheduling]\nswap_on_demand = false\n[models]\nfree_bytes_min = 0\n"


def play(
    tmp_path: Path, scenario: Callable[[Theatre], Awaitable[None]], settings: str = SETTINGS
) -> None:
    async def main() -> None:
        async with asyncio.timeout(120), staged(tmp_path, settings=settings) as stage:
            await scenario(stage)

    asyncio.run(main())


async def begin(
    stage: Theatre,
    repository: str = "acme/Tiny",
    revision: str = "",
    *,
    name: str = "",
    request_id: str = "",
    token_file: str = "",
    validate_only: bool = False,
) -> Operation:
    return await stage.node.parts.pulls.submit(
        Request("PullModel", request_id, repository + revision),
        name,
        Pulled(repository, revision, token_file=token_file),
        validate_only=validate_only,
    )


async def pull(stage: Theatre, *arguments: str, **fields: Any) -> Operation:
    operation = await begin(stage, *arguments, **fields)
    return await stage.node.parts.operations.wait(operation.name, None)


def directory(stage: Theatre, repository: str = "acme--Tiny") -> Path:
    return stage.root / "state" / "models" / repository


def files(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir()) if path.exists() else []


def test_a_pull_is_fetched_registered_and_not_fetched_again(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        done = await pull(stage, "acme/Tiny", "v1", name="tiny", token_file="/etc/token")
        assert done.result is not None
        assert (done.result.model, done.result.state) == ("tiny@1", "COLD")
        assert (done.stage, done.bytes_done) == (Stage.COMMITTED, 1002)
        version = stage.node.world.registry["tiny@1"]
        assert version.directory == str(directory(stage) / COMMIT)
        assert files(directory(stage)) == [COMMIT]
        # Looked up as named, fetched as found.
        assert [(each.revision, each.token_file) for each in stage.pullers.resolves] == [
            ("v1", "/etc/token"),
            (COMMIT, "/etc/token"),
        ]
        again = await pull(stage, "acme/Tiny", "v1", name="tiny")
        assert again.result is not None
        assert again.result.model == "tiny@1"
        stage.pullers.refuse_resolve = CallRefused("down", reason="HUB_UNAVAILABLE")
        other = await pull(stage, "acme/Tiny", COMMIT)
        assert other.result is not None
        assert other.result.model == "Tiny@1"
        assert len(stage.pullers.fetches) == 1
        # What is registered is there after a restart.
        await stage.kill()
        await stage.start()
        assert stage.node.world.registry.names() == ["Tiny", "tiny"]

    play(tmp_path, scenario)


def test_another_commit_is_another_version(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        await pull(stage)
        stage.pullers.commit = "f" * 40
        done = await pull(stage)
        assert done.result is not None
        assert done.result.model == "Tiny@2"
        assert files(directory(stage)) == [COMMIT, "f" * 40]

    play(tmp_path, scenario)


def test_nothing_changes_for_a_question(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        answer = await begin(stage, validate_only=True)
        assert (answer.name, answer.bytes_total) == ("", 1002)
        assert answer.result is not None
        assert "2 files, 1002 bytes" in answer.result.message
        assert not directory(stage).exists()
        assert stage.node.parts.operations.all() == []

    play(tmp_path, scenario)


def test_an_interrupted_pull_goes_on_after_a_restart(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.pullers.pause = asyncio.Event()
        begun = await begin(stage, "acme/Tiny", "main", request_id="once")
        await until(lambda: stage.pullers.fetches)
        await stage.kill()
        assert stage.pullers.running == 0
        assert files(directory(stage)) == [f"{COMMIT}.partial"]
        stage.pullers.pause.set()
        stage.pullers.commit = "f" * 40  # the branch has moved; the pull has not
        await stage.start()
        done = await stage.node.parts.operations.wait(begun.name, None)
        assert done.result is not None, done.failure
        assert stage.pullers.resolves[-1].revision == COMMIT
        replayed = await begin(stage, "acme/Tiny", "main", request_id="once")
        assert replayed.name == begun.name
        assert len(stage.pullers.fetches) == 2

    play(tmp_path, scenario)


def test_while_it_goes_on_after_a_restart_its_directory_is_claimed(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.pullers.pause = asyncio.Event()
        begun = await begin(stage)
        await until(lambda: stage.pullers.fetches)
        await stage.kill()
        await stage.start()
        with pytest.raises(Refused, match=begun.name) as caught:
            await begin(stage, name="other")
        assert caught.value.reason == "OPERATION_IN_PROGRESS"
        stage.pullers.pause.set()
        await stage.node.parts.operations.wait(begun.name, None)

    play(tmp_path, scenario)


def test_cancelling_removes_what_came_and_failing_keeps_it(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.pullers.refuse_fetch = CallRefused("no network", reason="HUB_UNAVAILABLE")
        failed = await pull(stage)
        assert failed.failure is not None
        assert failed.failure.reason == "HUB_UNAVAILABLE"
        assert files(directory(stage) / f"{COMMIT}.partial") == sorted(stage.pullers.files)
        stage.pullers.pause = asyncio.Event()
        begun = await begin(stage)
        await until(lambda: len(stage.pullers.fetches) == 2)
        await stage.node.parts.operations.cancel(begun.name)
        done = await stage.node.parts.operations.wait(begun.name, None)
        assert done.failure is not None
        assert done.failure.reason == "CANCELLED"
        assert files(directory(stage)) == []
        assert stage.pullers.running == 0

    play(tmp_path, scenario)


@pytest.mark.parametrize("reason", ["CHECKPOINT_INVALID", "ARCH_UNSUPPORTED"])
def test_what_can_never_be_served_is_not_kept(tmp_path: Path, reason: str) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.pullers.refuse_fetch = CallRefused("it was cut", reason=reason)
        failed = await pull(stage)
        assert failed.failure is not None
        assert (failed.failure.reason, files(directory(stage))) == (reason, [])
        assert stage.node.world.registry.names() == []

    play(tmp_path, scenario)


def test_no_more_pulls_than_allowed_run_at_once(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        stage.pullers.pause = asyncio.Event()
        begun = [await begin(stage, f"acme/m{index}") for index in range(3)]
        await until(lambda: stage.pullers.fetches)
        assert [each.stage for each in stage.node.parts.operations.all()].count(Stage.QUEUED) == 2
        stage.pullers.pause.set()
        for each in begun:
            done = await stage.node.parts.operations.wait(each.name, None)
            assert done.failure is None
        assert stage.pullers.most_fetching == 1

    play(tmp_path, scenario, SETTINGS + "pulls_max = 1\n")


def test_the_figure_of_a_disk_that_is_too_small(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        with pytest.raises(Refused, match="takes 1002 bytes, of which 0 are here") as caught:
            await begin(stage)
        assert caught.value.reason == "INSUFFICIENT_DISK"
        told = caught.value.metadata
        assert int(told["needed_bytes"]) == 1002 + (1 << 50)
        missing = int(told["needed_bytes"]) - int(told["free_bytes"])
        assert f"free {missing} more, or move [models] directory" in str(caught.value)
        assert not directory(stage).exists()

    play(tmp_path, scenario, SETTINGS.replace("_min = 0", f"_min = {1 << 50}"))


def test_an_offline_node_asks_nobody(tmp_path: Path) -> None:
    async def scenario(stage: Theatre) -> None:
        with pytest.raises(Refused, match=r"\[models\] offline or HF_HUB_OFFLINE") as caught:
            await begin(stage)
        assert caught.value.reason == "HUB_REFUSED"
        assert stage.pullers.resolves == []

    play(tmp_path, scenario, SETTINGS + "offline = true\n")


@pytest.mark.parametrize(
    ("field", "arguments", "fields"),
    [
        ("repository", ("../../etc",), {}),
        ("repository", ("a/b/c",), {}),
        ("repository", ("https://huggingface.co/acme/Tiny",), {}),
        ("revision", ("acme/Tiny", "a\nb"), {}),
        ("revision", ("acme/Tiny", "r" * 300), {}),
        ("token_file", ("acme/Tiny",), {"token_file": "token"}),
        ("name", ("acme/Tiny",), {"name": "a b"}),
        ("name", (f"acme/{'n' * 90}",), {}),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(
    tmp_path: Path, field: str, arguments: tuple[str, ...], fields: dict[str, str]
) -> None:
    async def scenario(stage: Theatre) -> None:
        with pytest.raises(Refused) as caught:
            await begin(stage, *arguments, **fields)  # type: ignore[arg-type]
        assert (caught.value.reason, caught.value.metadata["field"]) == ("INVALID_ARGUMENT", field)
        assert stage.pullers.resolves == []

    play(tmp_path, scenario)


# The configuration.


def test_the_hub_and_its_bounds_come_from_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "hotbayd.toml"
    path.write_text(f'[node]\nstate_dir = "{tmp_path}"\nruntime_dir = "{tmp_path}/run"\n')
    plain = load(path, {}, {}).models
    assert plain.hub_endpoint == "https://huggingface.co"
    assert plain.directory == f"{tmp_path}/models"
    assert not plain.offline
    environment = {"HF_ENDPOINT": "https://mirror.example/hf/", "HF_HUB_OFFLINE": "1"}
    mirrored = load(path, {}, environment).models
    assert (mirrored.hub_endpoint, mirrored.offline) == ("https://mirror.example/hf", True)
    path.write_text(path.read_text() + '[models]\nhub_endpoint = "http://127.0.0.1:9"\n')
    assert load(path, {}, environment).models.hub_endpoint == "http://127.0.0.1:9"
    path.write_text(path.read_text().partition("[models]")[0])
    with pytest.raises(ConfigInvalid, match="HF_ENDPOINT"):
        load(path, {}, {"HF_ENDPOINT": "mirror"})
    path.write_text(path.read_text() + '[models]\nhub_endpoint = "ftp://x"\n')
    with pytest.raises(ConfigInvalid, match=r"\[models\] hub_endpoint"):
        load(path, {}, {})


# The process.


def test_a_puller_that_is_gone_or_slow_is_said(tmp_path: Path) -> None:
    async def ask(timeout_s: float, kill: bool) -> ControlError:
        server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1")
        port = server.sockets[0].getsockname()[1]
        request = Resolve("acme/Tiny", f"http://127.0.0.1:{port}")
        async with Puller.start("acme/Tiny") as puller:
            if kill:
                puller._peer.link.close()
            with pytest.raises(ControlError) as caught:
                await puller.resolve(request, timeout_s)
        server.close()
        return caught.value

    slow = asyncio.run(ask(0.5, kill=False))
    assert isinstance(slow, CallRefused)
    assert slow.reason == "HUB_UNAVAILABLE"
    gone = asyncio.run(ask(30, kill=True))
    assert isinstance(gone, ProcessFailed)
    assert gone.reason == "PULL_FAILED"
