"""The geometry of a board: which GPU instances fit beside each other, and where.

It owns the values that describe a board's placements, whether they were read from NVML or from the
catalogue, and the exact enumeration of legal layouts over them. It never talks to a GPU and knows
no profile by name: sizes, starts and counts are data, so any number of memory slots works. The
invariant: in a legal layout no memory slot is taken twice, the compute slices of all instances are
at most the board's, and no profile has more instances than it allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from partitioner.catalogue import Board

MIB = 1 << 20


@dataclass(frozen=True, order=True)
class Instance:
    """A GPU instance of `profile` that takes `size` memory slots from slot `start`."""

    start: int
    size: int
    profile: str

    @cached_property
    def mask(self) -> int:
        """The memory slots taken, one bit each."""
        return ((1 << self.size) - 1) << self.start

    def __str__(self) -> str:
        return f"{self.profile}@{self.start}"


@dataclass(frozen=True)
class Profile:
    """One kind of instance, with every place it may take. `id` is NVML's number for it."""

    name: str
    id: int
    compute_slices: int
    max_instances: int
    memory_bytes: int
    sm_count: int
    placements: tuple[Instance, ...]

    @property
    def slots(self) -> int:
        """Memory slots that one instance takes."""
        return max(each.size for each in self.placements)


@dataclass(frozen=True)
class Geometry:
    """The profiles of one board. Slots and slices of the board are those of its largest profile."""

    profiles: tuple[Profile, ...]

    @cached_property
    def by_name(self) -> dict[str, Profile]:
        """Profiles by name."""
        return {profile.name: profile for profile in self.profiles}

    @cached_property
    def memory_slots(self) -> int:
        """How many memory slots the board has."""
        places = [place for profile in self.profiles for place in profile.placements]
        return max((place.start + place.size for place in places), default=0)

    @cached_property
    def compute_slices(self) -> int:
        """How many compute slices its instances can have together."""
        return max((profile.compute_slices for profile in self.profiles), default=0)

    @cached_property
    def placements(self) -> tuple[Instance, ...]:
        """Every place of every profile, in a fixed order."""
        return tuple(sorted(each for profile in self.profiles for each in profile.placements))

    @cached_property
    def plain(self) -> tuple[Profile, ...]:
        """Profiles without those that only add media engines to another one.

        Such a twin has the slices, multiprocessors and slots of a plain profile, but may exist
        fewer times. Nothing that asks for memory and multiprocessors should use it up.
        """
        return tuple(each for each in self.profiles if not self._is_twin(each))

    def _is_twin(self, profile: Profile) -> bool:
        shape = (profile.compute_slices, profile.sm_count, profile.slots)
        return any(
            (each.compute_slices, each.sm_count, each.slots) == shape
            and (each.max_instances, -each.id) > (profile.max_instances, -profile.id)
            and each.memory_bytes == profile.memory_bytes
            for each in self.profiles
        )

    def has(self, instance: Instance) -> bool:
        """Whether the board allows this profile at this place."""
        profile = self.by_name.get(instance.profile)
        return profile is not None and instance in profile.placements

    def problem(self, layout: Iterable[Instance]) -> str:
        """Say why a layout is not legal; nothing when it is."""
        instances = sorted(layout)
        for each in instances:
            if not self.has(each):
                return f"{each} is not a placement of this board"
        for index, each in enumerate(instances):
            for other in instances[index + 1 :]:
                if each.mask & other.mask:
                    return f"{each} and {other} overlap"
        slices = sum(self.by_name[each.profile].compute_slices for each in instances)
        if slices > self.compute_slices:
            return f"{slices} compute slices are asked for, the board has {self.compute_slices}"
        for name, count in Counter(each.profile for each in instances).items():
            if count > self.by_name[name].max_instances:
                most = self.by_name[name].max_instances
                return f"{count} instances of {name} are asked for, the board allows {most}"
        return ""

    def fits(self, layout: Iterable[Instance], more: Instance) -> bool:
        """Whether one more instance can join a legal layout."""
        return not self.problem((*layout, more))


def geometry_of(board: Board) -> Geometry:
    """The geometry of a board of the catalogue."""
    return Geometry(
        tuple(
            Profile(
                name=profile.name,
                id=profile.id,
                compute_slices=profile.compute_slices,
                max_instances=profile.max_instances,
                memory_bytes=profile.memory_mib * MIB,
                sm_count=profile.sm_count,
                placements=tuple(
                    Instance(place.start, place.size, profile.name) for place in profile.placements
                ),
            )
            for profile in board.profiles
        )
    )


def legal_layouts(
    geometry: Geometry, fixed: Iterable[Instance] = ()
) -> Iterator[tuple[Instance, ...]]:
    """Every legal layout that contains `fixed`, each once, sorted, the one without more included.

    With nothing fixed the first one is therefore the board without any instance.
    """
    start = tuple(sorted(fixed))
    taken = 0
    for each in start:
        taken |= each.mask
    slices = geometry.compute_slices - sum(
        geometry.by_name[each.profile].compute_slices for each in start
    )
    counts = Counter(each.profile for each in start)
    yield from _extend(geometry, start, 0, taken, slices, counts)


def _extend(
    geometry: Geometry,
    layout: tuple[Instance, ...],
    first: int,
    taken: int,
    slices: int,
    counts: Counter[str],
) -> Iterator[tuple[Instance, ...]]:
    yield tuple(sorted(layout))
    for index in range(first, len(geometry.placements)):
        place = geometry.placements[index]
        profile = geometry.by_name[place.profile]
        if place.mask & taken or profile.compute_slices > slices:
            continue
        if counts[place.profile] >= profile.max_instances:
            continue
        counts[place.profile] += 1
        rest = slices - profile.compute_slices
        yield from _extend(geometry, (*layout, place), index + 1, taken | place.mask, rest, counts)
        counts[place.profile] -= 1


def maximal_layouts(
    geometry: Geometry, fixed: Iterable[Instance] = ()
) -> Iterator[tuple[Instance, ...]]:
    """The legal layouts that contain `fixed` and to which no instance can be added."""
    for layout in legal_layouts(geometry, fixed):
        if not any(geometry.fits(layout, place) for place in geometry.placements):
            yield layout


def fragmentation(geometry: Geometry, layout: Iterable[Instance]) -> float:
    """How much of a board's memory is free but of no use, from 0 (nothing) to 1.

    For each plain profile: the free slots that no instance of it could take any more, now that
    `layout` stands, as a share of all slots; the mean over the profiles, each as likely to be asked
    for. It is the expected unusable remainder that fragmentation gradient descent follows, over
    MIG's slots.
    """
    stands = tuple(layout)
    taken, slices, counts = 0, geometry.compute_slices, Counter[str]()
    for each in stands:
        taken |= each.mask
        slices -= geometry.by_name[each.profile].compute_slices
        counts[each.profile] += 1
    free = ((1 << geometry.memory_slots) - 1) & ~taken
    if not free:
        return 0.0
    useless = 0
    for profile in geometry.plain:
        usable = 0
        if profile.compute_slices <= slices and counts[profile.name] < profile.max_instances:
            for place in profile.placements:
                if not place.mask & taken:
                    usable |= place.mask
        useless += (free & ~usable).bit_count()
    return useless / (len(geometry.plain) * geometry.memory_slots)
