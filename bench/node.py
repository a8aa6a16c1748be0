"""What a whole node holds: memory of its idle processes, and nothing more after 1,000 swaps.

    python -m bench.node [--output bench/results/node.json]

A real daemon, gateway and worker on the simulated board, two small models, swaps through the
control API while a trickle of requests is served. Counts after a warm-up of swaps, when every
lazily made thing is made, are compared with those after all swaps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from hotbay.local_node import LocalNode
from hotbay.v1 import common_pb2, model_pb2

from bench.results import Figure, report

REPOSITORY = Path(__file__).resolve().parents[1] / "examples" / "models"
IDLE_BYTES_MAX = 150 * 1000 * 1000
WARM_UP_SWAPS = 20
SETTLE_S = 2.0
REQUEST_EVERY_SWAPS = 10
ARENAS_MAX = 4


def memory(node: LocalNode) -> dict[str, int]:
    """Resident bytes of hotbayd and of the gateway."""
    return {
        process.role: psutil.Process(process.pid).memory_info().rss
        for process in node.client.node().processes
        if process.role in ("hotbayd", "gateway")
    }


def counts(node: LocalNode) -> dict[str, Any]:
    """What may not grow: device pages, host images, descriptors, threads, mappings, processes."""
    found = node.client.node()
    result: dict[str, Any] = {
        "device_free_bytes": node.client.partition("gpu0").memory_free_bytes,
        "host_used_bytes": found.host_store.used_bytes,
        "processes": len(found.processes),
    }
    for each in found.processes:
        process = psutil.Process(each.pid)
        result[f"{each.role} descriptors"] = process.num_fds()
        result[f"{each.role} children"] = len(process.children(recursive=True))
        if each.role == "worker":
            result["worker mappings"] = len(process.memory_maps(grouped=False))
    return result


def ask(url: str, model: str) -> None:
    """One request, which must be answered."""
    body = {"model": model, "prompt": "The", "max_tokens": 4, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()


def swap_many(node: LocalNode, url: str, count: int) -> list[common_pb2.Ledger]:
    """Swap back and forth; the model that has come in is asked every few swaps."""
    ledgers = []
    pair = ("prose", "code")
    for number in range(count):
        outgoing, incoming = pair if number % 2 == 0 else pair[::-1]
        operation = node.client.wait(node.client.swap(outgoing, incoming))
        response = model_pb2.SwapModelResponse()
        operation.response.Unpack(response)
        ledgers.append(response.ledger)
        if number % REQUEST_EVERY_SWAPS == 0:
            ask(url, incoming)
    return ledgers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hotbay-bench-") as root:
        config = {"scheduling": {"max_active_models": 1, "swap_on_demand": False}}
        with LocalNode(Path(root) / "node", repository=REPOSITORY, config=config) as node:
            time.sleep(SETTLE_S)
            idle = memory(node)
            for model in ("prose", "code"):
                node.client.wait(node.client.load(model))
            url = node.http_url
            swap_many(node, url, WARM_UP_SWAPS)
            time.sleep(SETTLE_S)
            before = counts(node)
            ledgers = swap_many(node, url, arguments.count - arguments.count % 2)
            time.sleep(SETTLE_S)
            after = counts(node)
            used = memory(node)
    mappings = after.pop("worker mappings") - before.pop("worker mappings")
    grown = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    lost = sum(ledger.requests_lost for ledger in ledgers)
    figures = [
        Figure(
            f"memory of {role}, idle",
            f"{idle[role] / 1e6:.0f} MB ({used[role] / 1e6:.0f} MB after the swaps)",
            "under 150 MB",
            idle[role] < IDLE_BYTES_MAX,
        )
        for role in ("hotbayd", "gateway")
    ]
    figures.append(
        Figure(
            f"{len(ledgers)} swaps: device, host, descriptor and process counts",
            f"differ: {grown}" if grown else "where they began",
            "where they began",
            not grown,
        )
    )
    figures.append(
        Figure(
            "mappings of the worker more than before",
            str(mappings),
            f"at most {ARENAS_MAX}, which an allocator's arenas may be",
            mappings <= ARENAS_MAX,
        )
    )
    figures.append(Figure(f"requests lost in {len(ledgers)} swaps", str(lost), "0", lost == 0))
    median = statistics.median(ledger.total_ms for ledger in ledgers)
    figures.append(Figure("one such swap, as the worker accounts for it", f"{median:.1f} ms"))
    met = report(
        "A whole node",
        figures,
        parameters={"swaps": len(ledgers), "models": "examples/models"},
        measurements={"idle_bytes": idle, "used_bytes": used, "before": before, "after": after},
        output=arguments.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
