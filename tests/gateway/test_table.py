"""Names to routes."""

from __future__ import annotations

from typing import Any

from daemon.gateway.table import Table, build_table
from engine.link.routes import Disposition, GatewayLimits, Route, SetTable, WorkerAddress


def route(model: str, **changes: Any) -> Route:
    name, version = model.split("@")
    values = {"default": True, "disposition": Disposition.SERVE, **changes}
    return Route(
        model=model,
        name=name,
        version=int(version),
        directory="/models",
        context_tokens=64,
        state="ACTIVE",
        **values,
    )


def table(*routes: Route) -> Table:
    worker = WorkerAddress("gpu0", "/run/tokens.sock", 1)
    return build_table(SetTable(4, routes, (worker,), GatewayLimits(1.0, 2)))


def test_a_name_means_its_default_version_and_a_key_itself() -> None:
    found = table(route("a@1", default=False), route("a@2"), route("b@7"))
    assert found.version == 4
    assert found.workers["gpu0"].generation == 1
    for name, key in {"a": "a@2", "a@1": "a@1", "a@2": "a@2", "b": "b@7"}.items():
        resolved = found.resolve(name)
        assert resolved is not None
        assert resolved.model == key
    for name in ("a@3", "c", "", "a@", "@1", "A"):
        assert found.resolve(name) is None


def test_a_name_without_a_default_version_means_nothing() -> None:
    assert table(route("a@1", default=False)).resolve("a") is None


def test_of_two_defaults_the_higher_version_has_the_name() -> None:
    for routes in ((route("a@2"), route("a@10")), (route("a@10"), route("a@2"))):
        resolved = table(*routes).resolve("a")
        assert resolved is not None
        assert resolved.version == 10


def test_only_a_route_that_serves_is_served() -> None:
    found = table(
        route("a@1"),
        route("b@1", disposition=Disposition.HOLD),
        route("c@1", disposition=Disposition.REFUSE),
    )
    assert [found.serves(key) for key in ("a@1", "b@1", "c@1", "d@1")] == [
        True,
        False,
        False,
        False,
    ]


def test_before_the_first_table_nothing_is_known() -> None:
    assert not Table().received
    assert Table().resolve("a") is None
    assert table().received
