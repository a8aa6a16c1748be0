"""How well models are packed onto a node, how long that takes, and how much load it lets in.

    python -m bench.placing [--instances N] [--arrivals N] [--output FILE]

Everything is drawn from seeds, so that all but the times come out alike on every machine.

Time: 64 models onto eight H200, 20 such nodes, the explanations of what was left out included; in
seconds of the one core that it runs on, so that others on the machine do not count.
Value: random models on one or two boards of five kinds, few enough that the exhaustive search can
tell the best; the sum of what was packed over the sum of the best, and the worst single node.
Load: models that come and go on eight H200, more of them than fit. The load that is let in is
memory times the time that it stays; first fit takes the first GPU with room, there the first room,
else the smallest profile at its first place. The packer's choice is taken without and with moving
up to three instances for an arrival. Beside it stands, for models behind walls, the load where
free slots are of use wherever they are, as if anything could be moved at any time.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.results import Figure, report
from partitioner.catalogue import load_catalogue
from partitioner.geometry import geometry_of
from partitioner.layout import GpuState
from partitioner.packing.arriving import (
    Arrivals,
    Choice,
    Node,
    Standing,
    first_fit,
    least_fragmenting,
    least_fragmenting_or_moving,
)
from partitioner.packing.exact import best_value
from partitioner.packing.filling import cuts_of
from partitioner.packing.packer import pack
from partitioner.packing.rooms import Rooms
from partitioner.packing.sharing import Rules, load_rules
from partitioner.packing.values import Bin, Isolation, ModelNeed
from partitioner.packing.why import explain

MIB, GIB = 1 << 20, 1 << 30
PAGE_BYTES, RESERVE_BYTES = 64 * MIB, 3 * GIB
GPUS, MODELS, NODES = 8, 64, 20
EXACT_MODELS = 8
BOARDS = ("h200", "a100-80", "h100-80", "a30", "rtx-pro-6000")
REACH_S, REACH_VALUE, REACH_LOAD = 1.0, 0.98, 1.10

STREAMS = (1, 2, 3)
ARRIVALS_PER_S, STAY_S = 0.5, 100.0
STREAM_WEIGHTS_GIB = (2, 8, 16, 24, 50)
STREAM_TENANTS = 6


def gpu(index: int, board: str) -> Bin:
    """A board in MIG mode."""
    found = load_catalogue().board(board)
    memory_bytes = (found.memory_mib - found.reserved_mib) * MIB
    state = GpuState(
        *(f"GPU-{index}", index, found.product, "", geometry_of(found), memory_bytes, True)
    )
    return Bin(state, found.sm_count, found.memory_gb_per_s * 1e9)


def models(chance: random.Random, count: int, rules: Rules) -> list[ModelNeed]:
    """Of all sizes, tenants, walls and targets; some of them fit nowhere."""
    drawn = []
    for index in range(count):
        weights_bytes = chance.choice((1, 2, 4, 8, 14, 16, 28, 60)) * GIB
        alone_ms = 1000 * weights_bytes / (4.8e12 * rules.decode_reach)
        drawn.append(
            ModelNeed(
                name=f"m{index}",
                weights_bytes=weights_bytes,
                kv_bytes=chance.choice((1, 2, 4, 8, 16)) * GIB,
                tenant=f"t{chance.randrange(4)}",
                isolation=Isolation(chance.choice((0, 1, 1, 2))),
                value=float(chance.randint(1, 10)),
                requests=8,
                ms_per_token=alone_ms * chance.choice((0, 0, 1.5, 2.5, 4, 9, 12)),
                alone_ms=alone_ms,
            )
        )
    return drawn


def times_s(rules: Rules) -> list[float]:
    """What packing a node takes, once for each seed."""
    bins = [gpu(index, "h200") for index in range(GPUS)]
    taken = []
    for seed in range(NODES):
        wanted = models(random.Random(seed), MODELS, rules)
        began = time.process_time()
        packing = pack(wanted, bins, rules)
        explain(wanted, bins, rules, packing)
        taken.append(time.process_time() - began)
    return taken


def graded(rules: Rules, instances: int) -> list[tuple[float, float]]:
    """Packed and best value of each random node."""
    values = []
    for seed in range(instances):
        chance = random.Random(1000 + seed)
        bins = [gpu(index, chance.choice(BOARDS)) for index in range(chance.choice((1, 2)))]
        wanted = models(chance, EXACT_MODELS, rules)
        values.append((pack(wanted, bins, rules).value, best_value(wanted, bins, rules)))
    return values


@dataclass(frozen=True)
class Stream:
    """Models with the times at which they come and would go."""

    models: tuple[ModelNeed, ...]
    stays: tuple[tuple[float, float], ...]


def stream(seed: int, arrivals: int, *, walled: bool) -> Stream:
    """Arrivals at random times. `walled`: each behind a wall in hardware, so nobody shares."""
    chance = random.Random(seed)
    drawn, stays, now_s = [], [], 0.0
    for index in range(arrivals):
        now_s += chance.expovariate(ARRIVALS_PER_S)
        stays.append((now_s, now_s + chance.expovariate(1 / STAY_S)))
        drawn.append(
            ModelNeed(
                name=f"m{index}",
                weights_bytes=chance.choice(STREAM_WEIGHTS_GIB) * GIB,
                kv_bytes=chance.choice((2, 4)) * GIB,
                tenant=f"t{index if walled else chance.randrange(STREAM_TENANTS)}",
                isolation=Isolation.HARDWARE if walled else Isolation.PROCESS,
            )
        )
    return Stream(tuple(drawn), tuple(stays))


def let_in(rules: Rules, arriving: Stream, choice: Choice) -> tuple[float, int]:
    """The load that is let in, as a part of all, and how many instances were moved for it."""
    rooms = Rooms(arriving.models, rules)
    arrivals = Arrivals(rooms)
    node: Node = tuple(Standing(gpu(index, "h200")) for index in range(GPUS))
    ends: list[tuple[float, int]] = []
    accepted = offered = 0.0
    moved = 0
    for index, (comes_s, goes_s) in enumerate(arriving.stays):
        while ends and ends[0][0] <= comes_s:
            _, gone = heapq.heappop(ends)
            node = tuple(each.without(gone) for each in node)
        load = rooms.bytes[index] * (goes_s - comes_s)
        offered += load
        admitted = choice(arrivals, node, index)
        if admitted is None:
            continue
        node, moved, accepted = admitted.node, moved + admitted.moved, accepted + load
        heapq.heappush(ends, (goes_s, index))
    return accepted / offered, moved


def slots_let_in(rules: Rules, arriving: Stream) -> float:
    """The part of the load that is let in where an arrival needs slots, and no matter which."""
    (cuts,) = cuts_of([gpu(0, "h200")])
    kinds = sorted({room for cut in cuts.sets for room in cut}, key=lambda room: room.slots)
    rooms = Rooms(arriving.models, rules)
    free = GPUS * gpu(0, "h200").state.geometry.memory_slots
    ends: list[tuple[float, int]] = []
    accepted = offered = 0.0
    for index, (comes_s, goes_s) in enumerate(arriving.stays):
        while ends and ends[0][0] <= comes_s:
            free += heapq.heappop(ends)[1]
        load = rooms.bytes[index] * (goes_s - comes_s)
        offered += load
        slots = next(room.slots for room in kinds if rooms.fits(frozenset((index,)), room))
        if slots <= free:
            free, accepted = free - slots, accepted + load
            heapq.heappush(ends, (goes_s, slots))
    return accepted / offered


def loads(rules: Rules, arrivals: int, *, walled: bool) -> dict[str, list[tuple[float, int]]]:
    """By policy, what each stream let in and moved."""
    policies: dict[str, Choice] = {
        "first fit": first_fit,
        "with moves": least_fragmenting_or_moving,
        "without moves": least_fragmenting,
    }
    streams = [stream(seed, arrivals, walled=walled) for seed in STREAMS]
    measured = {
        name: [let_in(rules, each, choice) for each in streams] for name, choice in policies.items()
    }
    if walled:
        measured["slots anywhere"] = [(slots_let_in(rules, each), 0) for each in streams]
    return measured


def load_figures(
    what: str, measured: dict[str, list[tuple[float, int]]], arrivals: int
) -> list[Figure]:
    """Load against first fit: all streams together, and the least of them."""
    base = [load for load, _ in measured["first fit"]]
    figures = []
    for policy in measured:
        if policy == "first fit":
            continue
        found = [load for load, _ in measured[policy]]
        more = sum(found) / sum(base)
        least = min(one / other for one, other in zip(found, base, strict=True))
        bound = policy == "with moves"
        moves = sum(moved for _, moved in measured[policy])
        figures.append(
            Figure(
                f"{what}, {policy}: load let in against first fit's "
                f"{100 * statistics.mean(base):.0f}%, {len(base)} streams",
                f"{100 * (more - 1):+.1f}% (least {100 * (least - 1):+.1f}%), "
                f"{100 * moves / (arrivals * len(base)):.1f} moves per 100 arrivals",
                "at least +10%" if bound else "",
                more >= REACH_LOAD if bound else None,
            )
        )
    return figures


def value_figures(values: Sequence[tuple[float, float]]) -> list[Figure]:
    """Packed value against the best."""
    ratio = sum(packed for packed, _ in values) / sum(best for _, best in values)
    worst = min(packed / best for packed, best in values if best)
    exact = sum(packed == best for packed, best in values)
    return [
        Figure(
            f"value packed of the best there is, {len(values)} nodes of {EXACT_MODELS} models",
            f"{100 * ratio:.2f}%",
            "at least 98%",
            ratio >= REACH_VALUE,
        ),
        Figure("nodes packed as well as can be", f"{exact} of {len(values)}"),
        Figure("the worst node", f"{100 * worst:.1f}%", "at least 98%", worst >= REACH_VALUE),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--instances", type=int, default=50)
    parser.add_argument("--arrivals", type=int, default=500)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rules = load_rules(PAGE_BYTES, RESERVE_BYTES)
    taken = times_s(rules)
    values = graded(rules, options.instances)
    measured = {
        "behind walls in hardware": loads(rules, options.arrivals, walled=True),
        "in MPS shares": loads(rules, options.arrivals, walled=False),
    }
    what = f"{MODELS} models on {GPUS} GPUs, processor time"
    figures = [
        Figure(
            f"{what}, worst of {NODES}",
            f"{max(taken):.2f} s",
            f"under {REACH_S:g} s",
            max(taken) < REACH_S,
        ),
        Figure(f"{what}, median", f"{statistics.median(taken):.2f} s"),
        *value_figures(values),
    ]
    for name, each in measured.items():
        figures += load_figures(name, each, options.arrivals)
    met = report(
        "placing",
        figures,
        parameters={
            "gpus": GPUS,
            "models": MODELS,
            "instances": options.instances,
            "arrivals": options.arrivals,
            "arrivals_per_s": ARRIVALS_PER_S,
            "stay_s": STAY_S,
            "stream_weights_gib": STREAM_WEIGHTS_GIB,
        },
        measurements={"pack_s": taken, "values": values, "loads": measured},
        output=options.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
