"""Addresses of the daemon."""

from __future__ import annotations

import pytest
from hotbay.endpoints import UNIX_PATH_BYTES_MAX, default_endpoint, target_of
from hotbay.errors import EndpointInvalid


@pytest.mark.parametrize(
    ("user_id", "environment", "endpoint"),
    [
        (0, {}, "unix:/run/hotbay/control.sock"),
        (0, {"XDG_RUNTIME_DIR": "/run/user/0"}, "unix:/run/hotbay/control.sock"),
        (1000, {"XDG_RUNTIME_DIR": "/tmp/r"}, "unix:/tmp/r/hotbay/control.sock"),
        (1000, {}, "unix:/run/user/1000/hotbay/control.sock"),
        (1000, {"XDG_RUNTIME_DIR": ""}, "unix:/run/user/1000/hotbay/control.sock"),
    ],
)
def test_the_default_is_the_socket_of_the_users_own_daemon(
    user_id: int, environment: dict[str, str], endpoint: str
) -> None:
    assert default_endpoint(user_id, environment) == endpoint
    assert target_of(endpoint) == endpoint


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("/run/a.sock", "unix:/run/a.sock"),
        ("unix:///run/a.sock", "unix:/run/a.sock"),
        (" unix:/run/a.sock\n", "unix:/run/a.sock"),
        ("localhost:50051", "localhost:50051"),
        ("[::1]:50051", "[::1]:50051"),
    ],
)
def test_addresses_as_people_write_them(written: str, target: str) -> None:
    assert target_of(written) == target


@pytest.mark.parametrize(
    "written", ["", "host", "host:", ":80", "host:http", "host:0", "host:65536", "unix:a.sock"]
)
def test_an_address_that_cannot_be_used_is_quoted(written: str) -> None:
    with pytest.raises(EndpointInvalid, match=r"endpoint '"):
        target_of(written)


def test_a_socket_path_beyond_the_systems_limit_is_refused_with_the_figures() -> None:
    fits = "/" + "a" * (UNIX_PATH_BYTES_MAX - 1)
    assert target_of(fits) == f"unix:{fits}"
    with pytest.raises(EndpointInvalid, match=r"has 108 bytes; the system allows 107"):
        target_of(fits + "a")
