"""One GPU is cut anew under traffic: what hotbayd adds to it, and what other streams notice.

    python -m bench.repartition [--changes N] [--output bench/results/repartition.json]

A real daemon, gateway and workers on two simulated H200, whose driver answers at once. One model
streams on an instance of the GPU that is cut, another one on the other GPU, without a pause. An
instance beside the first model goes and another comes, and back. What hotbayd adds is everything
but the ends and starts of worker processes: planning again, the journal, every step with its look
at holders and its reading back, new partitions and routes. Every answer is held against the one
from before the first change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hotbay.local_node import LocalNode
from hotbay.operations import operation_response
from hotbay.v1 import partition_pb2

from bench.results import Figure, report

REPOSITORY = Path(__file__).resolve().parents[1] / "examples" / "models"
OVERHEAD_MS_MAX = 200.0
TOKENS = 48
PROMPT = "The"
QUIET_S = 5.0
KEPT = "gpu0/3g.71gb@4"
LAYOUT = """
version: 1
gpus:
- {{index: 0, partitions: [{{profile: 3g.71gb, start: 4}}, {{profile: {profile}, start: 0}}]}}
"""
TURNS = ("1g.18gb", "2g.35gb")
ADDED = ("plan", "cut", "commit")


@dataclass
class Stream:
    """Requests to one model, one after the other; when each chunk came, and wrong answers."""

    url: str
    model: str
    arrivals_s: list[float] = field(default_factory=list)
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    _expected: str = ""
    _ending: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `end`: the first answer is what all others have to be."""
        body = {"model": self.model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        with httpx.Client(timeout=60) as client:
            while not self._ending.is_set():
                text, began = "", len(self.arrivals_s)
                try:
                    with client.stream(
                        "POST", f"{self.url}/v1/completions", json={**body, "stream": True}
                    ) as response:
                        response.raise_for_status()
                        for line in response.iter_lines():
                            if line.startswith("data: {"):
                                self.arrivals_s.append(time.monotonic())
                                text += json.loads(line[6:])["choices"][0]["text"]
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                self._expected = self._expected or text
                if text != self._expected or len(self.arrivals_s) == began:
                    self.wrong.append(text)
                self.answers += 1

    def end(self) -> None:
        """After the answer that is coming."""
        self._ending.set()

    def gaps_ms(self, began_s: float, ended_s: float) -> list[float]:
        """Between chunks that came within these times."""
        within = [each for each in list(self.arrivals_s) if began_s <= each <= ended_s]
        return [1000 * (b - a) for a, b in itertools.pairwise(within)]


@dataclass(frozen=True)
class Change:
    """One change of layout: what the daemon says of it, and when it was."""

    phases_ms: dict[str, float]
    began_s: float
    ended_s: float

    @property
    def added_ms(self) -> float:
        """What hotbayd adds to the driver and to processes."""
        return sum(self.phases_ms[name] for name in ADDED)


def recut(node: LocalNode, profile: str) -> Change:
    """Plan and apply one layout, end to end through the API."""
    began_s = time.monotonic()
    plan = node.client.plan_layout(LAYOUT.format(profile=profile))
    assert KEPT not in plan.destroy
    done = node.client.wait(node.client.apply_layout(plan.plan_id))
    response = operation_response(done)
    assert isinstance(response, partition_pb2.ApplyLayoutResponse)
    return Change(dict(response.phases_ms), began_s, time.monotonic())


def take(node: LocalNode, changes: int) -> tuple[list[Change], list[Stream], float]:
    """Cut back and forth under two streams; the changes, the streams, and when it was quiet."""
    recut(node, TURNS[1])
    node.client.wait(node.client.load("prose", partition=KEPT))
    node.client.wait(node.client.load("code", partition="gpu1"))
    streams = [Stream(node.http_url, model) for model in ("prose", "code")]
    threads = [threading.Thread(target=each.run, daemon=True) for each in streams]
    for thread in threads:
        thread.start()
    time.sleep(QUIET_S)
    quiet_s = time.monotonic()
    done = [recut(node, TURNS[number % 2]) for number in range(changes)]
    for stream in streams:
        stream.end()
    for thread in threads:
        thread.join(60)
    return done, streams, quiet_s


def figures_of(changes: list[Change], streams: list[Stream]) -> list[Figure]:
    added = sorted(each.added_ms for each in changes)
    wrong = sum(len(each.wrong) for each in streams)
    answers = sum(each.answers for each in streams)
    figures = [
        Figure(
            f"what hotbayd adds to a change of layout, worst of {len(changes)}",
            f"{added[-1]:.0f} ms (median {statistics.median(added):.0f})",
            f"under {OVERHEAD_MS_MAX:.0f} ms",
            added[-1] < OVERHEAD_MS_MAX,
        ),
        Figure(
            f"answers of {answers} that were cut short, refused or changed",
            str(wrong),
            "0",
            wrong == 0,
        ),
    ]
    for name in ("plan", "drain", "cut", "commit", "start"):
        middle = statistics.median(each.phases_ms[name] for each in changes)
        figures.append(Figure(f"  {name}, median", f"{middle:.0f} ms"))
    return figures


def gap_figures(changes: list[Change], streams: list[Stream], quiet_s: float) -> list[Figure]:
    figures = []
    for stream, where in zip(streams, ("the GPU that is cut", "the other GPU"), strict=True):
        quiet = stream.gaps_ms(0.0, quiet_s)
        during = stream.gaps_ms(changes[0].began_s, changes[-1].ended_s)
        figures.append(
            Figure(
                f"gap between tokens on {where}: median, worst",
                f"{statistics.median(during):.1f}, {max(during):.0f} ms "
                f"(before: {statistics.median(quiet):.1f}, {max(quiet):.0f})",
            )
        )
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--changes", type=int, default=10)
    arguments = parser.parse_args()
    config: dict[str, dict[str, Any]] = {
        "scheduling": {"swap_on_demand": False, "stage_ahead": False},
        "worker": {"threads": 1},
    }
    with (
        tempfile.TemporaryDirectory(prefix="hotbay-bench-") as root,
        LocalNode(
            Path(root) / "node", simulate="h200x2", repository=REPOSITORY, config=config
        ) as node,
    ):
        changes, streams, quiet_s = take(node, arguments.changes)
    met = report(
        "repartition",
        [*figures_of(changes, streams), *gap_figures(changes, streams, quiet_s)],
        parameters={"changes": len(changes), "board": "h200x2", "tokens": TOKENS},
        measurements={"phases_ms": [each.phases_ms for each in changes]},
        output=arguments.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
