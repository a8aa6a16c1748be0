"""The gateway's metrics: plain numbers on the token path, Prometheus' text only when asked for.

Counting must cost well under a microsecond, so the numbers are integers in dictionaries and lists
that one collector reads at scrape time. hotbayd's families are parsed and rendered anew beside
the gateway's own, so that the page is valid whatever arrives; where both have a family of the same
name, the gateway's is shown.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """Counts of observations between bounds; as cheap as a bisection."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in seconds."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, documentation: str) -> HistogramMetricFamily:
        """The histogram as Prometheus has it, with cumulative buckets."""
        labels = [*(str(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(labels, map(float, accumulate(self._counts)), strict=True))
        return HistogramMetricFamily(name, documentation, buckets=buckets, sum_value=self._sum)


class GatewayMetrics:
    """What the gateway counts. `gauges` are read when somebody asks."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        """By model and HTTP status; the model is empty where none was resolved."""
        self.prompt_tokens: Counter[str] = Counter()
        self.generation_tokens: Counter[str] = Counter()
        self.cancelled_requests = 0
        self.open_requests = 0
        self.first_token_seconds = Histogram(FIRST_TOKEN_BOUNDS_S)
        self.inter_token_seconds = Histogram(INTER_TOKEN_BOUNDS_S)
        self.hold_seconds = Histogram(FIRST_TOKEN_BOUNDS_S)
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "hotbay_open_requests": ("Requests being answered.", lambda: self.open_requests)
        }

    def collect(self) -> Iterator[Metric]:
        """All families of the gateway's own."""
        requests = CounterMetricFamily(
            "hotbay_gateway_requests", "Requests by status.", labels=("model", "code")
        )
        for labels, count in self.requests.items():
            requests.add_metric(labels, count)
        yield requests
        for name, documentation, counts in (
            ("hotbay_prompt_tokens", "Prompt tokens of accepted requests.", self.prompt_tokens),
            ("hotbay_generation_tokens", "Tokens that workers sent.", self.generation_tokens),
        ):
            tokens = CounterMetricFamily(name, documentation, labels=("model",))
            for model, count in counts.items():
                tokens.add_metric((model,), count)
            yield tokens
        yield CounterMetricFamily(
            "hotbay_cancelled_requests",
            "Requests whose client went away.",
            value=self.cancelled_requests,
        )
        yield self.first_token_seconds.family(
            "hotbay_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        yield self.inter_token_seconds.family(
            "hotbay_inter_token_seconds", "Between two steps of one sequence."
        )
        yield self.hold_seconds.family(
            "hotbay_hold_seconds", "How long requests were held for their model."
        )
        for name, (documentation, read) in self.gauges.items():
            yield GaugeMetricFamily(name, documentation, value=read())


class _Families:
    """A collector over families that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(metrics: GatewayMetrics, control_text: str | None) -> bytes:
    """The node's page: the gateway's families, and hotbayd's where it answered.

    `hotbay_control_up` is 0 when `control_text` is None or does not parse.
    """
    families = {family.name: family for family in metrics.collect()}
    process = ProcessCollector(namespace="hotbay_gateway", registry=None)
    families.update((family.name, family) for family in process.collect())
    up = 0
    if control_text is not None:
        try:
            theirs = list(text_string_to_metric_families(control_text))
        except ValueError:
            theirs = []
        else:
            up = 1
        for family in theirs:
            if family.samples:
                families.setdefault(family.name, family)
    families["hotbay_control_up"] = GaugeMetricFamily(
        "hotbay_control_up", "Whether hotbayd answered for this page.", value=up
    )
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)
