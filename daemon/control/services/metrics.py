"""hotbayd's metrics, and the workers': counted here, read from reports, given to the gateway.

It owns a registry of its own and what it counts; the gateway serves the text beside its own
metrics. Figures of workers are read from their last report when asked, so that nothing is counted
twice and a worker's figures go when it goes. Names follow Prometheus' rules: units last, counters
end in `_total`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon.control.actions.disk_cache import DiskCache
from daemon.control.actions.gpu_readings import GpuMonitor
from daemon.control.services.gpu_metrics import GpuMetrics
from daemon.control.services.health import HealthMetrics
from daemon.control.services.share_metrics import ShareMetrics
from daemon.control.state.records import Operation
from daemon.control.state.world import World
from engine.link.control import ExchangeResult, Ledger
from partitioner.mps.sightings import SeenPlace

RATIO_BUCKETS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2, 4)
PHASE_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Everything that is counted; `text` is the exposition."""

    def __init__(
        self,
        world: World,
        disk: DiskCache,
        monitor: GpuMonitor,
        shares: Callable[[], Iterable[SeenPlace]],
    ) -> None:
        self._registry = CollectorRegistry()
        self._swaps = Counter(
            "hotbay_swaps",
            "Swaps on partitions, loads and unloads among them, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        self._phases = Histogram(
            "hotbay_swap_phase_seconds",
            "Duration of each phase of committed swaps.",
            ["phase"],
            buckets=PHASE_BUCKETS_S,
            registry=self._registry,
        )
        self._prediction = Histogram(
            "hotbay_swap_prediction_ratio",
            "Duration of committed swaps over what their plan foresaw.",
            buckets=RATIO_BUCKETS,
            registry=self._registry,
        )
        self._bytes = Counter(
            "hotbay_swap_copied_bytes",
            "Bytes of weights copied to devices.",
            registry=self._registry,
        )
        self._requests = Counter(
            "hotbay_swap_requests",
            "Running requests of outgoing models, by what became of them.",
            ["fate"],
            registry=self._registry,
        )
        self._operations = Counter(
            "hotbay_operations",
            "Finished operations, by kind, cause and outcome.",
            ["kind", "cause", "outcome"],
            registry=self._registry,
        )
        self._registry.register(Reports(world, disk))
        self._registry.register(GpuMetrics(world, monitor))
        self._registry.register(ShareMetrics(world, monitor, shares))
        self._registry.register(HealthMetrics(world))

    def exchanged(self, result: ExchangeResult, predicted_ms: float = 0.0) -> None:
        """Count a swap, load or unload that ended on its partition; 0: nothing was foreseen."""
        failed = bool(result.error or result.error_reason)
        self._swaps.labels("rolled_back" if failed else "committed").inc()
        ledger = result.ledger
        self._requests.labels("lost").inc(ledger.requests_lost)
        if failed:
            return
        phases = {
            "drain": ledger.drain_ms,
            "evict": ledger.evict_ms,
            "park": ledger.park_ms,
            "link_wait": ledger.link_wait_ms,
            "copy": ledger.copy_ms,
            "verify": ledger.verify_ms,
            "total": ledger.total_ms,
        }
        if ledger.canary_ms:
            phases["canary"] = ledger.canary_ms
        self.first_token(ledger)
        for phase, milliseconds in phases.items():
            self._phases.labels(phase).observe(milliseconds / 1000)
        if predicted_ms:
            self._prediction.observe(ledger.total_ms / predicted_ms)
        self._bytes.inc(ledger.copied_bytes)
        self._requests.labels("finished").inc(ledger.requests_finished)
        self._requests.labels("kept").inc(ledger.requests_kept)
        self._requests.labels("preserved").inc(ledger.requests_preserved)

    def first_token(self, ledger: Ledger) -> None:
        """Observe when the incoming model's first token came, if it has; once for each exchange."""
        if ledger.first_token_ms is not None:
            self._phases.labels("first_token").observe(ledger.first_token_ms / 1000)
            # Known with the first token: KV is brought back just before.
            self._phases.labels("unpark").observe(ledger.unpark_ms / 1000)

    def operation_ended(self, record: Operation) -> None:
        """Count an operation that is done."""
        outcome = record.failure.reason if record.failure is not None else "OK"
        intent = record.intent
        self._operations.labels(intent.kind.value, intent.cause.value, outcome).inc()

    def text(self) -> str:
        """The exposition, in Prometheus' text format."""
        return generate_latest(self._registry).decode()


class Reports(Collector):
    """What the world and the workers say when asked."""

    def __init__(self, world: World, disk: DiskCache) -> None:
        self._world = world
        self._disk = disk

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        yield from self._node()
        yield from self._images()
        yield from self._partitions()
        yield from self._engines()

    def _node(self) -> Iterable[Metric]:
        store = self._world.store
        bytes_ = GaugeMetricFamily(
            "hotbay_host_store_bytes", "Host memory for images.", labels=["kind"]
        )
        bytes_.add_metric(["budget"], store.budget_bytes)
        bytes_.add_metric(["images"], store.images_bytes)
        bytes_.add_metric(["reserved"], store.reserved_bytes)
        bytes_.add_metric(["spare"], self._world.spare.bytes)
        yield bytes_
        labels = ["role", "partition"]
        resident = GaugeMetricFamily(
            "hotbay_process_resident_bytes", "Memory of each process.", labels=labels
        )
        restarts = CounterMetricFamily(
            "hotbay_process_restarts", "Starts after the first one.", labels=labels
        )
        for info in self._world.processes.processes():
            resident.add_metric([info.role, info.partition], info.resident_bytes)
            restarts.add_metric([info.role, info.partition], info.restarts)
        yield resident
        yield restarts

    def _images(self) -> Iterable[Metric]:
        bytes_ = GaugeMetricFamily(
            "hotbay_image_cache_bytes", "Images kept on disk.", labels=["kind"]
        )
        bytes_.add_metric(["budget"], self._disk.budget_bytes)
        bytes_.add_metric(["images"], self._disk.kept_bytes)
        loads = CounterMetricFamily(
            "hotbay_image_loads", "Images brought to host memory, by origin.", labels=["origin"]
        )
        for origin, count in self._disk.loads.items():
            loads.add_metric([origin], count)
        failures = CounterMetricFamily(
            "hotbay_image_cache_failures", "Images on disk that were unusable or not written."
        )
        failures.add_metric([], self._disk.failures)
        yield from (bytes_, loads, failures)

    def _partitions(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("hotbay_worker_up", "Whether it answers.", labels=["partition"])
        pages = GaugeMetricFamily(
            "hotbay_worker_pages", "Device memory pages.", labels=["partition", "state"]
        )
        link = GaugeMetricFamily(
            "hotbay_worker_link_bytes_per_second",
            "Measured host-to-device rate, or its throttle.",
            labels=["partition"],
        )
        workers = self._world.processes.workers
        for partition in self._world.partitions:
            client = workers.get(partition)
            up.add_metric([partition], float(client is not None))
            if client is not None:
                state = client.state
                pages.add_metric([partition, "free"], state.pages_free)
                pages.add_metric([partition, "used"], state.pages_total - state.pages_free)
                link.add_metric([partition], state.link_bytes_per_s)
        yield from (up, pages, link)

    def _engines(self) -> Iterable[Metric]:
        labels = ["partition", "model"]
        gauges = {
            name: GaugeMetricFamily(f"hotbay_engine_{name}", text, labels=labels)
            for name, text in (
                ("running", "Requests being computed."),
                ("waiting", "Requests that wait inside the engine."),
                ("paused", "Waiting requests whose KV stayed on the device."),
                ("parked", "Waiting requests whose KV is in host memory."),
                ("parked_bytes", "KV of requests in host memory."),
                ("kv_used_bytes", "KV in use by requests."),
                ("kv_bytes", "KV pages in use or promised."),
                ("cached_bytes", "Cached prefixes that no request uses now."),
                ("weights_bytes", "Weights on the device."),
                ("graphs", "Batches of decodes captured as graphs."),
                ("graph_bytes", "Memory of these, beside the pages."),
            )
        }
        counters = {
            name: CounterMetricFamily(f"hotbay_engine_{name}", text, labels=labels)
            for name, text in (
                ("prompt_tokens", "Prompt tokens computed."),
                ("generation_tokens", "Tokens generated."),
                ("computed_tokens", "Tokens put through the model, again counted again."),
                ("prefix_lookup_tokens", "Prompt tokens looked for in the prefix cache."),
                ("prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
                ("preemptions", "Requests put back to make room for others."),
                ("preemptions_parked", "Of those, whose KV was parked and not computed again."),
                ("graph_replays", "Steps that were replayed from a graph."),
                ("graph_capture_seconds", "Time that steps waited for graphs to be captured."),
            )
        }
        for partition, client in self._world.processes.workers.items():
            for engine in client.state.engines:
                for name, gauge in gauges.items():
                    gauge.add_metric([partition, engine.model], getattr(engine, name))
                for name, counter in counters.items():
                    value = getattr(engine, f"{name}_total")
                    counter.add_metric([partition, engine.model], value)
        yield from gauges.values()
        yield from counters.values()
