"""How long it takes to plan every GPU of a node anew, and whether as little as possible is lost.

    python -m bench.layouts [--trials N] [--output FILE]

Each trial takes eight H200 in random layouts to random other ones, written by profile (so that the
planner has to find the places), with two of the instances' models moving. Nothing but the planner
is timed. The number of destroyed instances is compared with a search over every legal layout.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from bench.results import Figure, report
from partitioner.catalogue import load_catalogue
from partitioner.geometry import Geometry, Instance, geometry_of, legal_layouts
from partitioner.layout import Costs, GpuState, GpuWanted, Wanted
from partitioner.planner import plan

GPUS = 8
REACH_MS = 50.0
CHECKED_TRIALS = 20

Layout = tuple[Instance, ...]


def node(geometry: Geometry, layouts: list[Layout]) -> list[GpuState]:
    return [
        GpuState(f"GPU-{index}", index, "H200", "", geometry, 1, True, instances=layout)
        for index, layout in enumerate(layouts)
    ]


def wanted(geometry: Geometry, layouts: list[Layout]) -> list[GpuWanted]:
    return [
        GpuWanted(
            f"GPU-{index}",
            tuple(
                Wanted(geometry.by_name[each.profile].placements, each.profile) for each in layout
            ),
        )
        for index, layout in enumerate(layouts)
    ]


def least_destroyed(layouts: list[Layout], have: Layout, want: Layout) -> int:
    """The least of all legal layouts with the wanted profiles."""
    profiles = Counter(each.profile for each in want)
    alike = [each for each in layouts if Counter(one.profile for one in each) == profiles]
    return min(len(set(have) - set(each)) for each in alike)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    geometry = geometry_of(load_catalogue().board("h200"))
    layouts = list(legal_layouts(geometry))
    chance = random.Random(1)
    times_ms: list[float] = []
    more = 0
    for trial in range(options.trials):
        have = [chance.choice(layouts) for _ in range(GPUS)]
        want = [chance.choice(layouts) for _ in range(GPUS)]
        states, wishes = node(geometry, have), wanted(geometry, want)
        places = [state.partition_id(each) for state in states for each in state.instances]
        costs = Costs(move_ms={name: chance.uniform(50, 500) for name in places[:2]})
        began = time.perf_counter()
        planned = plan(states, wishes, costs)
        times_ms.append(1000 * (time.perf_counter() - began))
        if trial < CHECKED_TRIALS:
            for gpu, before, after in zip(planned.gpus, have, want, strict=True):
                least = least_destroyed(layouts, before, after)
                more += len(gpu.destroyed_instances) - least
    worst_ms, middle_ms = max(times_ms), statistics.median(times_ms)
    figures = [
        Figure(
            f"plan of {GPUS} GPUs, worst of {options.trials}",
            f"{worst_ms:.1f} ms",
            f"under {REACH_MS:.0f} ms",
            worst_ms < REACH_MS,
        ),
        Figure(f"plan of {GPUS} GPUs, median", f"{middle_ms:.1f} ms"),
        Figure(
            f"instances destroyed beyond the least, {CHECKED_TRIALS} trials",
            str(more),
            "0",
            more == 0,
        ),
    ]
    met = report(
        "layouts",
        figures,
        parameters={"gpus": GPUS, "board": "h200", "trials": options.trials},
        measurements={"plan_ms": times_ms},
        output=options.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
