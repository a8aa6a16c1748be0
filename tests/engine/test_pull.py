"""Pulling: which files, over a real HTTP server that misbehaves, and what stays on disk."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import (
    ArchitectureUnsupported,
    CheckpointInvalid,
    ChecksumMismatch,
    EngineError,
    HubNotFound,
    HubRefused,
    HubUnavailable,
    InsufficientDisk,
    PullError,
    PullGivenUp,
)
from engine.link.pull import RemoteFile, Resolve
from engine.pull.fetch import Fetcher
from engine.pull.hub import Hub
from engine.pull.process import Found, check, resolve
from engine.pull.selection import listing, needed
from swap.errors import CheckpointInvalid as FilesInvalid
from tests.support.hub import FakeHub, Refusal

PROSE = Path(__file__).resolve().parents[2] / "examples" / "models" / "prose" / "1"
REPOSITORY = "acme/Tiny"
WEIGHTS = "model.safetensors"
# Longer than any pause, so that a trouble that passes is outlived.
PATIENCE_S = 120.0
WAIT_S = 120.0


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        running.add(REPOSITORY, PROSE)
        yield running


def look(hub: FakeHub, revision: str = "", *, token_file: str = "", patience_s: float = 0) -> Found:
    request = Resolve(REPOSITORY, hub.endpoint, revision, token_file, patience_s)
    return resolve(request, threading.Event())


def bring(found: Found, directory: Path, patience_s: float = PATIENCE_S, threads: int = 2) -> int:
    fetcher = Fetcher(
        found.hub,
        found.commit,
        directory,
        patience_s=patience_s,
        given_up=threading.Event(),
    )
    fetcher.fetch_all(found.files, threads)
    assert fetcher.present_bytes == sum(file.size_bytes for file in found.files)
    return fetcher.received_bytes


def same(directory: Path) -> None:
    """What was fetched is the checkpoint, byte for byte, and nothing else."""
    for path in directory.iterdir():
        assert path.read_bytes() == (PROSE / path.name).read_bytes(), path.name
    check(directory)


# Which files.


def test_only_what_serving_needs_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    unneeded = {
        "pytorch_model.bin": b"b" * 100_000,
        "consolidated.safetensors": b"c" * 100_000,
        "original/consolidated.00.pth": b"p",
        "onnx/model.onnx": b"o",
        "../outside.json": b"{}",
        ".hidden": b"",
        "README.md": b"#",
    }
    hub.add(REPOSITORY, PROSE, files=unneeded)
    found = look(hub)
    bring(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    same(tmp_path)
    assert all(hub.bytes_sent(name) == 0 for name in unneeded)


def test_of_shards_those_of_the_index_are_fetched(hub: FakeHub) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "second.safetensors"}}
    files = {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": b"1",
        "second.safetensors": b"2",
        "third.safetensors": b"3",
    }
    repository = hub.add(REPOSITORY, PROSE, files=files)
    del repository.files[WEIGHTS]
    names = [file.name for file in look(hub).files]
    assert names[-3:] == [
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "second.safetensors",
    ]
    del repository.files["second.safetensors"]
    with pytest.raises(CheckpointInvalid, match=r"index.json names second.safetensors, which is"):
        look(hub)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_repository_that_cannot_be_served_says_what_it_lacks(hub: FakeHub, missing: str) -> None:
    hub.add(REPOSITORY, PROSE, files={"pytorch_model.bin": b"b"})
    del hub.repositories[REPOSITORY].files[missing]
    with pytest.raises(CheckpointInvalid, match=missing) as caught:
        look(hub)
    assert "pytorch_model.bin" in str(caught.value)
    assert hub.bytes_sent("pytorch_model.bin") == 0


def test_an_unsupported_family_is_refused_before_its_weights_come(hub: FakeHub) -> None:
    config = json.loads((PROSE / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    hub.add(REPOSITORY, PROSE, files={"config.json": json.dumps(config).encode()})
    with pytest.raises(ArchitectureUnsupported, match="MambaForCausalLM"):
        look(hub)
    assert hub.bytes_sent(WEIGHTS) == 0


def test_names_that_lead_elsewhere_are_never_chosen() -> None:
    names = ["config.json", "../config.json", "/etc/passwd", "a/b.json", "..", "", "x\0y", ".x"]
    found = listing([RemoteFile(name, 1) for name in names])
    assert list(found) == ["config.json"]
    shards = {"../../model.safetensors"}
    files = listing([RemoteFile(name, 1) for name in ("config.json", "tokenizer.json")])
    files["model.safetensors.index.json"] = RemoteFile("model.safetensors.index.json", 1)
    with pytest.raises(CheckpointInvalid, match="which is not there"):
        needed(files, shards, REPOSITORY)


@pytest.mark.parametrize("size", [-1, None, 1 << 50])
def test_a_size_that_cannot_be_is_refused(hub: FakeHub, size: int | None) -> None:
    hub.announced[WEIGHTS] = {"size": size}
    with pytest.raises(CheckpointInvalid, match=WEIGHTS):
        look(hub)


# What a hub answers.


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (Refusal(404, "RepoNotFound"), HubNotFound, "shows no repository acme/Tiny"),
        (Refusal(401, "RepoNotFound"), HubNotFound, "--token-file"),
        (Refusal(404, "RevisionNotFound"), HubNotFound, "no revision 'v9'"),
        (Refusal(403, "GatedRepo"), HubRefused, "accept its terms on"),
        (Refusal(403), HubRefused, "give a token that may read it"),
        (Refusal(429), HubUnavailable, "answers 429 .* try again later"),
        (Refusal(500), HubUnavailable, "answers 500"),
        (Refusal(503), HubUnavailable, "answers 503"),
        (Refusal(418), PullError, "answers 418"),
    ],
)
def test_refusals_name_the_repository_and_what_to_do(
    hub: FakeHub, refusal: Refusal, kind: type[EngineError], words: str
) -> None:
    hub.refusals["v9"] = refusal
    with pytest.raises(kind, match=words) as caught:
        look(hub, "v9")
    assert type(caught.value) is kind
    assert REPOSITORY in str(caught.value)
    assert caught.value.metadata["endpoint"] == hub.endpoint


def test_nobody_listens(hub: FakeHub) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(HubUnavailable, match=r"cannot be reached .* acme/Tiny"):
            resolve(Resolve(REPOSITORY, endpoint), threading.Event())


def test_troubles_that_pass_are_outlived(hub: FakeHub, tmp_path: Path) -> None:
    hub.refusals["/api/models/acme/Tiny"] = Refusal(429, headers={"Retry-After": "1"}, times=1)
    hub.refusals[WEIGHTS] = Refusal(500, times=2)
    hub.break_after["tokenizer.json"] = [0, 1000, 50_000]
    found = look(hub, patience_s=PATIENCE_S)
    bring(found, tmp_path)
    same(tmp_path)
    assert len(hub.asked(WEIGHTS)) == 3
    starts = [sent.range for sent in hub.asked("tokenizer.json")]
    assert starts == ["", "", "bytes=1000-", "bytes=51000-"]
    assert hub.bytes_sent("tokenizer.json") == (PROSE / "tokenizer.json").stat().st_size


def test_a_token_is_sent_to_its_hub_and_to_nobody_else(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPOSITORY, PROSE, token="hf_secret")
    with pytest.raises(HubNotFound):
        look(hub)
    token_file = tmp_path / "token"
    token_file.write_text("hf_wrong\n")
    with pytest.raises(HubRefused) as caught:
        look(hub, token_file=str(token_file))
    assert "hf_wrong" not in str(caught.value) + str(caught.value.metadata)
    token_file.write_text("hf_secret\n")
    target = tmp_path / "to"
    target.mkdir()
    with FakeHub() as storage:
        storage.add(REPOSITORY, PROSE)
        hub.elsewhere[WEIGHTS] = storage.endpoint
        bring(look(hub, token_file=str(token_file)), target)
        same(target)
        assert hub.asked(WEIGHTS)[0].token == "hf_secret"
        assert [sent.token for sent in storage.requests] == [""]


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff", b"x" * 5000])
def test_a_token_file_must_hold_one_token(
    hub: FakeHub, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HubRefused, match="token file") as caught:
        look(hub, token_file=str(path))
    assert "words" not in str(caught.value)
    assert hub.requests == []


# What is on disk.


def test_what_is_there_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    found, size = look(hub), (PROSE / WEIGHTS).stat().st_size
    hub.break_after[WEIGHTS] = [1_000_000]
    with pytest.raises(HubUnavailable, match="broke off for acme/Tiny@0123456789ab: "):
        bring(found, tmp_path, patience_s=0)
    assert (tmp_path / f"{WEIGHTS}.part").stat().st_size == 1_000_000
    assert not (tmp_path / WEIGHTS).exists()
    bring(found, tmp_path)
    assert hub.bytes_sent(WEIGHTS) == size
    same(tmp_path)
    assert bring(found, tmp_path) == 0
    assert hub.bytes_sent(WEIGHTS) == size


def test_a_hub_without_ranges_starts_over(hub: FakeHub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.break_after[WEIGHTS] = [1_000_000]
    bring(look(hub), tmp_path)
    same(tmp_path)


def test_what_is_not_what_was_announced_is_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    content = (PROSE / WEIGHTS).read_bytes()
    hub.sent[WEIGHTS] = content[:-1] + bytes([content[-1] ^ 1])
    found = look(hub)
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors arrived with the hash"):
        bring(found, tmp_path)
    assert not list(tmp_path.glob(f"{WEIGHTS}*"))
    del hub.sent[WEIGHTS]
    bring(found, tmp_path)
    same(tmp_path)
    # Small files are hashed as git does.
    hub.sent["config.json"] = (PROSE / "config.json").read_bytes().replace(b"1", b"2")
    with pytest.raises(ChecksumMismatch, match=r"config\.json"):
        look(hub)


def test_more_than_was_announced_is_never_written(hub: FakeHub, tmp_path: Path) -> None:
    found, size = look(hub), (PROSE / WEIGHTS).stat().st_size
    hub.sent[WEIGHTS] = (PROSE / WEIGHTS).read_bytes() + b"x" * (8 << 20)
    with pytest.raises(ChecksumMismatch, match=f"more than the {size} bytes"):
        bring(found, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob(f"{WEIGHTS}*")) <= size


def test_altered_parts_are_found_by_the_hash(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / f"{WEIGHTS}.part").write_bytes(b"\0" * 1000)
    found = look(hub)
    with pytest.raises(ChecksumMismatch):
        bring(found, tmp_path)
    bring(found, tmp_path)
    same(tmp_path)


def test_a_sound_download_of_an_unsound_checkpoint(hub: FakeHub, tmp_path: Path) -> None:
    content = (PROSE / WEIGHTS).read_bytes()
    hub.add(REPOSITORY, PROSE, files={WEIGHTS: content[:-100]})
    bring(look(hub), tmp_path)
    with pytest.raises(FilesInvalid, match=r"model.safetensors: it was cut"):
        check(tmp_path)


def test_a_full_disk_says_which_and_how_to_go_on(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(hub)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InsufficientDisk, match=r"is full at .* \[models\] directory") as caught:
        bring(found, tmp_path)
    assert caught.value.metadata["directory"] == str(tmp_path)


def test_giving_up_ends_every_thread(hub: FakeHub, tmp_path: Path) -> None:
    hub.stop_after[WEIGHTS] = 100_000
    found, given_up = look(hub), threading.Event()
    fetcher = Fetcher(found.hub, found.commit, tmp_path, patience_s=60, given_up=given_up)
    caught: list[BaseException] = []

    def run() -> None:
        try:
            fetcher.fetch_all(found.files, 4)
        except PullError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert hub.standing.wait(WAIT_S)
    given_up.set()
    hub.go_on.set()
    thread.join(WAIT_S)
    assert [type(error) for error in caught] == [PullGivenUp]


def test_a_hub_is_one_repository(hub: FakeHub) -> None:
    commit, files = Hub(hub.endpoint, REPOSITORY, None).list("main")
    assert commit == hub.repositories[REPOSITORY].commit
    assert {file.name for file in files} == {path.name for path in PROSE.iterdir()}


def test_the_program_says_what_it_wants() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "engine.pull.process"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--descriptor" in done.stderr
