"""The boards that ship, and the refusal of boards that contradict themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import yaml

from partitioner.catalogue import load_catalogue, parse_catalogue
from partitioner.errors import DocumentError, UnknownBoardError
from partitioner.strict_yaml import MAX_DOCUMENT_DEPTH, StrictModel, parse, read_document

CLASSIC_FIVE = (0, 1, 2, 3, 4)


def _board(**changes: Any) -> dict[str, Any]:
    profile = {
        "name": "1g.1gb",
        "enum": 0,
        "id": 19,
        "compute_slices": 1,
        "max_instances": 2,
        "memory_mib": 512,
        "sm_count": 8,
        "copy_engines": 1,
        "decoders": 0,
        "slots": 1,
        "starts": [0, 1],
        "confidence": "low",
    }
    board = {
        "product": "Test",
        "compute_capability": [9, 0],
        "sm_count": 16,
        "memory_mib": 1024,
        "reserved_mib": 0,
        "pci_device_ids": [0x1234],
        "pcie_generation": 5,
        "pcie_lanes": 16,
        "power_limit_w": 100,
        "memory_slots": 2,
        "compute_slices": 2,
        "confidence": "low",
        "profiles": [{**profile, **changes.pop("profile", {})}],
    }
    return {**board, **changes}


def _catalogue_text(**changes: Any) -> str:
    return yaml.safe_dump({"version": 1, "boards": {"test": _board(**changes)}})


def test_the_boards_that_must_be_there_are_there() -> None:
    catalogue = load_catalogue()
    promised = {"a30", "a100-40", "a100-80", "h100-80", "h100-94"}
    assert promised | {"gh200", "h200", "b200", "rtx-pro-6000"} == set(catalogue.boards)
    h200 = catalogue.board("h200")
    assert (h200.sm_count, h200.memory_mib, h200.memory_slots) == (132, 143771, 8)
    assert catalogue.by_pci_device_id(0x2335) is h200
    assert catalogue.by_pci_device_id(0x0001) is None
    assert catalogue.board("H100") is catalogue.boards["h100-80"]


def test_names_and_device_ids_are_unique_across_boards() -> None:
    catalogue = load_catalogue()
    names = catalogue.names()
    assert len(names) == len(set(names))
    ids = [number for board in catalogue.boards.values() for number in board.pci_device_ids]
    assert len(ids) == len(set(ids))


def test_an_unknown_board_names_the_nearest() -> None:
    with pytest.raises(UnknownBoardError, match=r"'h20O' \(did you mean 'h200'\?\); known boards:"):
        load_catalogue().board("h20O")


def test_more_slices_never_mean_fewer_sms_or_less_memory() -> None:
    for board in load_catalogue().boards.values():
        plain = [profile for profile in board.profiles if profile.enum in CLASSIC_FIVE]
        plain.sort(key=lambda profile: profile.compute_slices)
        for smaller, larger in itertools.pairwise(plain):
            assert smaller.sm_count < larger.sm_count
            assert smaller.memory_mib <= larger.memory_mib
        assert plain[-1].memory_mib == board.memory_mib - board.reserved_mib


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reserved_mib": 1024}, "reserved_mib leaves no memory"),
        ({"pci_device_ids": [0x12345]}, "PCI device id lies between"),
        ({"pci_device_ids": []}, "pci_device_ids"),
        ({"memory_mib": 0}, "memory_mib"),
        ({"pcie_lanes": 3}, "pcie_lanes"),
        ({"confidence": "certain"}, "confidence"),
        ({"profile": {"slots": 2}}, "leaves the grid of 2 memory slots"),
        ({"profile": {"starts": [-1]}}, "leaves the grid"),
        ({"profile": {"starts": [0, 0]}}, "a start is given twice"),
        ({"profile": {"starts": []}}, "starts"),
        ({"profile": {"compute_slices": 3}}, "compute_slices is above the board's 2"),
        ({"profile": {"memory_mib": 2048}}, "memory_mib is above the board's 1024"),
        ({"profile": {"sm_count": 17}}, "sm_count is above the board's 16"),
        (
            {"profiles": [_board()["profiles"][0], _board()["profiles"][0]]},
            "two profiles share the same name",
        ),
        ({"memroy_mib": 3}, r"unknown key 'memroy_mib' \(did you mean 'memory_mib'\?\)"),
    ],
)
def test_a_board_that_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DocumentError, match=words) as refused:
        parse_catalogue(_catalogue_text(**changes), "boards.yaml")
    assert refused.value.line > 0


class _Inner(StrictModel):
    size: int
    weight: float = 0.0


class _Document(StrictModel):
    name: str
    inner: tuple[_Inner, ...] = ()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: x\ninner:\n  - size: 1\n    wieght: 2\n", 4, "'wieght' .did you mean 'weight'"),
        ("name: x\ninner:\n  - size: many\n", 3, "inner.0.size"),
        ("name: x\ninner:\n  - weight: 1\n", 3, "the key 'inner.0.size' is missing"),
        ("inner: []\n", 1, "the key 'name' is missing"),
        ("name: x\nname: y\n", 2, "given twice"),
        ("name: x\n<<: {a: 1}\n", 2, "unknown key"),
        ("name: &a x\n", 1, "anchors and aliases"),
        ("name: [x\n", 2, "not valid YAML"),
        ("name: x\n? [a]\n: b\n", 2, "a key must be a plain name"),
        ("name: !!python/name:os.system x\n", 1, "not valid YAML"),
        ("name: 2026-13-40\n", 1, "is not a value"),
        ("- a\n", 0, "must be a mapping"),
        ("", 0, "must be a mapping"),
        ("name: x\n---\nname: y\n", 2, "not valid YAML"),
        ("name: \0\n", 0, "not valid YAML"),
        ("name: " + "[" * 50 + "]" * 50, 1, "nests deeper"),
        ("name: " + "[" * 5000, 0, "nests deeper"),
    ],
)
def test_a_document_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(DocumentError, match=words) as refused:
        parse(_Document, text, "some.yaml")
    assert refused.value.line == line
    assert str(refused.value).startswith("some.yaml")


def test_several_problems_are_told_at_once_in_order() -> None:
    text = "inner:\n  - size: x\n  - size: y\nname: 1\n"
    with pytest.raises(DocumentError) as refused:
        parse(_Document, text, "some.yaml")
    message = str(refused.value)
    assert message.startswith("some.yaml, line 2: inner.0.size")
    assert message.index("line 3: inner.1.size") < message.index("line 4: name")


def test_a_document_on_disk_is_bounded_and_utf_8(tmp_path: Any) -> None:
    assert MAX_DOCUMENT_DEPTH < 50
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (1 << 20) + b"x")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xe9\n")
    for path, words in (
        (large, "larger than 1048576 bytes"),
        (latin, "not UTF-8 at byte 6"),
        (tmp_path / "none.yaml", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(DocumentError, match=words):
            read_document(path)
