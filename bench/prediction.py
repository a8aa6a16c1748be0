"""How near a plan's predicted milliseconds come to what the swap then takes.

    python -m bench.prediction [--count 100] [--output bench/results/prediction.json]

A whole node whose link is throttled, with room for one model, so that each swap copies one. Of four
swaps one finds a request running and waits for its end (drained), and one finds a request whose KV
it keeps (preserved). Each is planned just before it is done; the first ones, of which the node has
seen nothing like, count as well. The kinds are stated apart, beside the median of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal

import httpx
from hotbay.local_node import LocalNode
from hotbay.model_calls import InFlight
from hotbay.v1 import model_pb2

from bench.node import REPOSITORY
from bench.results import Figure, report

LINK_BYTES_PER_S = 100e6
MEMORY_BYTES = 24 << 20
ERROR_MAX = 0.15
TOKENS = 128
Kind = Literal["idle", "drained", "preserved"]
KINDS: tuple[Kind, ...] = ("idle", "preserved", "idle", "drained")
"""What swaps do with requests, one after the other and over again."""


@dataclasses.dataclass(frozen=True)
class Swap:
    """One swap: what was foreseen, and what it came to."""

    kind: Kind
    predicted_ms: float
    actual_ms: float
    predicted_parked_bytes: int
    parked_bytes: int

    @property
    def error(self) -> float:
        return abs(self.predicted_ms - self.actual_ms) / self.actual_ms


def ask(url: str, model: str) -> None:
    body = {"model": model, "prompt": "The", "max_tokens": TOKENS, "temperature": 0}
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()


def running(node: LocalNode) -> bool:
    return any(each.running for each in node.client.partition("gpu0").models)


def swaps(node: LocalNode, count: int) -> list[Swap]:
    """Swap two models back and forth."""
    found, pair = [], ("prose", "code")
    asking: list[threading.Thread] = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        if kind != "idle":
            asking.append(threading.Thread(target=ask, args=(node.http_url, pair[0])))
            asking[-1].start()
            while asking[-1].is_alive() and not running(node):
                pass
        policy: InFlight = "preserve" if kind == "preserved" else "drain"
        operation = node.client.wait(node.client.swap(*pair, in_flight=policy))
        if kind != "preserved":  # what was preserved ends only once its model is back
            for each in asking:
                each.join()
            asking.clear()
        response = model_pb2.SwapModelResponse()
        operation.response.Unpack(response)
        plan, ledger = response.plan, response.ledger
        if not ledger.copied_bytes:
            raise RuntimeError("nothing was copied")
        if kind == "preserved" and not ledger.requests_preserved:
            kind = "idle"  # it ended just before
        found.append(
            Swap(kind, ledger.predicted_ms, ledger.total_ms, plan.parked_bytes, ledger.parked_bytes)
        )
        pair = pair[::-1]
    for each in asking:  # the last one may have been preserved
        node.client.wait(node.client.swap(*pair))
        each.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = {
        "worker": {
            "memory_bytes": MEMORY_BYTES,
            "context_tokens_max": 256,
            "link_bytes_per_s": LINK_BYTES_PER_S,
        },
        "scheduling": {"max_active_models": 1, "swap_on_demand": False, "drain_timeout_s": 30.0},
    }
    with (
        tempfile.TemporaryDirectory(prefix="hotbay-bench-") as root,
        LocalNode(Path(root) / "node", repository=REPOSITORY, config=config) as node,
    ):
        node.client.wait(node.client.load("prose"))
        node.client.wait(node.client.load("code", standby=True))
        found = swaps(node, arguments.count)
    median = statistics.median(each.error for each in found)
    figures = [
        Figure(
            f"error of the prediction, median of {len(found)} swaps",
            f"{median:.1%}",
            f"<= {ERROR_MAX:.0%}",
            median <= ERROR_MAX,
        ),
    ]
    for kind in dict.fromkeys(KINDS):
        alike = [each for each in found if each.kind == kind]
        if alike:
            error = statistics.median(each.error for each in alike)
            actual_ms = statistics.median(each.actual_ms for each in alike)
            figures.append(
                Figure(f"  of {len(alike)} {kind} ones, of {actual_ms:.0f} ms", f"{error:.1%}")
            )
    met = report(
        "Predicted against actual",
        figures,
        parameters={"count": arguments.count, "link_bytes_per_s": LINK_BYTES_PER_S},
        measurements={"swaps": [dataclasses.asdict(each) for each in found]},
        output=arguments.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
