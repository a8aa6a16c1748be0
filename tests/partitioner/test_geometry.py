"""Layouts are counted against known figures and against a count made another way."""

from __future__ import annotations

import itertools

import pytest

from partitioner.catalogue import load_catalogue
from partitioner.geometry import (
    Geometry,
    Instance,
    fragmentation,
    geometry_of,
    legal_layouts,
)


def board(name: str, *digits: str) -> Geometry:
    """A board's plain profiles; with `digits` only those whose names start so."""
    plain = geometry_of(load_catalogue().board(name)).plain
    return Geometry(tuple(each for each in plain if not digits or each.name in digits))


@pytest.mark.parametrize("geometry", [board("a30"), board("rtx-pro-6000"), board("h200")], ids=str)
def test_the_enumeration_equals_trying_every_set_of_placements(geometry: Geometry) -> None:
    places = geometry.placements[:14]
    few = Geometry(geometry.profiles)
    tried = {
        chosen
        for size in range(len(places) + 1)
        for chosen in itertools.combinations(places, size)
        if size <= few.compute_slices and _by_the_rules(few, chosen)
    }
    found = {each for each in legal_layouts(few) if set(each) <= set(places)}
    assert found == tried


def _by_the_rules(geometry: Geometry, chosen: tuple[Instance, ...]) -> bool:
    """The three rules, written out slot by slot."""
    slots = [slot for each in chosen for slot in range(each.start, each.start + each.size)]
    names = [each.profile for each in chosen]
    slices = {each.name: each.compute_slices for each in geometry.profiles}
    most = {each.name: each.max_instances for each in geometry.profiles}
    return (
        len(slots) == len(set(slots))
        and sum(slices[name] for name in names) <= max(slices.values())
        and all(names.count(name) <= most[name] for name in names)
    )


def test_media_twins_are_not_plain() -> None:
    geometry = geometry_of(load_catalogue().board("h200"))
    assert "1g.18gb+me" in geometry.by_name
    assert [each.name for each in geometry.plain] == [
        *("1g.18gb", "1g.35gb", "2g.35gb", "3g.71gb", "4g.71gb", "7g.141gb"),
    ]


def test_problems_are_named() -> None:
    geometry = board("h200")
    three = [Instance(0, 4, "3g.71gb"), Instance(4, 4, "3g.71gb")]
    assert geometry.problem(three) == ""
    assert "overlap" in geometry.problem([three[0], Instance(2, 2, "2g.35gb")])
    assert "not a placement" in geometry.problem([Instance(7, 1, "1g.18gb")])
    # Four and three slices leave none for slot 7, had it been a legal place.
    four = [Instance(0, 4, "4g.71gb"), Instance(4, 2, "2g.35gb"), Instance(6, 2, "1g.35gb")]
    assert geometry.problem(four) == ""


def test_fragmentation_is_zero_when_empty_or_full_and_grows_with_a_bad_place() -> None:
    geometry = board("h200")
    assert fragmentation(geometry, [Instance(0, 8, "7g.141gb")]) == 0.0
    # Of an empty board only what no placement reaches is useless: slot 7 for 1g, 6 and 7 for 2g,
    # 4 to 7 for 4g.
    assert fragmentation(geometry, []) == pytest.approx((1 + 0 + 2 + 0 + 4 + 0) / (6 * 8))
    edge = fragmentation(geometry, [Instance(6, 1, "1g.18gb")])
    middle = fragmentation(geometry, [Instance(2, 1, "1g.18gb")])
    assert edge < middle <= 1.0
