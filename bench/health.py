"""From an XID to a drained partition, and from the driver's word to requests that go on.

    python -m bench.health [--rounds 10] [--output bench/results/health.json]

A whole node with two simulated GPUs, a model on each, and streams of completions on both. In every
round the simulated driver reports XID 109 on the first GPU (`gpuctl sim inject xid gpu0 109`);
measured is the time from that call until the worker says that nothing runs there. Then the driver
says that it asks for no reset (XID 154), and measured is the time until the GPU is proven healthy.
Every stream must be answered to its end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from hotbay.local_node import LocalNode
from hotbay.v1 import health_pb2, simulation_pb2

from bench.results import Figure, report

REPOSITORY = Path(__file__).resolve().parents[1] / "examples" / "models"
MODELS = (("prose", "gpu0"), ("code", "gpu1"))
STREAMS = 4
TOKENS = 400
DRAINED_S_MAX = 1.0
LOOK_INTERVAL_S = 0.005
TIMEOUT_S = 120.0
MEMORY_BYTES = 128 << 20
# Between two rounds, so that requests run again.
SETTLE_S = 0.5
XID_SWITCH_TIMEOUT = 109
XID_RECOVERY_ACTION_CHANGED = 154


@dataclass
class Traffic:
    """Streams of one model, one after the other in each thread."""

    url: str
    model: str
    stop: threading.Event
    answered: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        body = {"model": self.model, "prompt": "The", "max_tokens": TOKENS, "ignore_eos": True}
        while not self.stop.is_set():
            try:
                response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S)
                response.raise_for_status()
                self.answered += 1
            except httpx.HTTPError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                return


def inject(node: LocalNode, number: int) -> None:
    """The driver reports an XID on the first GPU."""
    xid = simulation_pb2.Xid(number=number)
    node.client.inject(simulation_pb2.InjectRequest(target="gpu0", xid=xid))


def until(condition: Callable[[], bool]) -> float:
    """Seconds until the node says so. Raises RuntimeError."""
    began_s = time.monotonic()
    while not condition():
        if time.monotonic() - began_s > TIMEOUT_S:
            raise RuntimeError(f"it did not come about within {TIMEOUT_S:g} s")
        time.sleep(LOOK_INTERVAL_S)
    return time.monotonic() - began_s


def running(node: LocalNode, partition: str) -> int:
    """Requests that run there, as the worker says when asked."""
    return sum(each.running for each in node.client.partition(partition).models)


def state(node: LocalNode) -> int:
    """That of the first GPU."""
    return int(node.client.gpus().gpus[0].units[0].state)


def one_round(node: LocalNode) -> tuple[float, float]:
    """Seconds from the XID to a drained partition, and from the driver's word to a healthy one."""
    until(lambda: running(node, "gpu0") > 0)
    began_s = time.monotonic()
    inject(node, XID_SWITCH_TIMEOUT)
    # Between two requests nothing runs for a moment: drained is who is tainted as well.
    until(lambda: state(node) == health_pb2.HEALTH_STATE_RECOVERING)
    until(lambda: running(node, "gpu0") == 0)
    drained_s = time.monotonic() - began_s
    began_s = time.monotonic()
    inject(node, XID_RECOVERY_ACTION_CHANGED)
    until(lambda: state(node) == health_pb2.HEALTH_STATE_HEALTHY)
    return drained_s, time.monotonic() - began_s


def measure(rounds: int) -> tuple[list[tuple[float, float]], list[Traffic]]:
    """All rounds on one node, under traffic."""
    config = {
        "worker": {"memory_bytes": MEMORY_BYTES},
        "health": {"correlation_s": 3600},
    }
    stop = threading.Event()
    with (
        tempfile.TemporaryDirectory(prefix="hotbay-bench-") as root,
        LocalNode(
            Path(root) / "node", simulate="h200x2", repository=REPOSITORY, config=config
        ) as node,
    ):
        for model, partition in MODELS:
            node.client.wait(node.client.load(model, partition=partition))
        traffic = [Traffic(node.http_url, model, stop) for model, _ in MODELS]
        threads = [threading.Thread(target=each.run) for each in traffic for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        try:
            found = []
            for _ in range(rounds):
                found.append(one_round(node))
                time.sleep(SETTLE_S)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    return found, traffic


def main() -> int:
    """Run the benchmark; the exit status says whether its bounds were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found, traffic = measure(arguments.rounds)
    drained = [each[0] for each in found]
    healthy = [each[1] for each in found]
    failures = [failure for each in traffic for failure in each.failures]
    answered = ", ".join(f"{each.model} {each.answered}" for each in traffic)
    figures = [
        Figure(
            "from the XID to a partition where nothing runs",
            f"{statistics.median(drained) * 1000:.0f} ms, at most {max(drained) * 1000:.0f} ms",
            f"under {DRAINED_S_MAX * 1000:.0f} ms",
            max(drained) < DRAINED_S_MAX,
        ),
        Figure(
            "from the driver's word to a proven GPU",
            f"{statistics.median(healthy) * 1000:.0f} ms, at most {max(healthy) * 1000:.0f} ms",
        ),
        Figure(
            f"requests lost of those answered ({answered})",
            str(len(failures)),
            "0",
            not failures,
        ),
    ]
    met = report(
        "A GPU in trouble",
        figures,
        parameters={"rounds": arguments.rounds, "streams": STREAMS, "tokens": TOKENS},
        measurements={"drained_s": drained, "healthy_s": healthy, "failures": failures},
        output=arguments.output,
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
