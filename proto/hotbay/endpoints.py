"""Where hotbayd is: the default address of its control socket, and what an address may look like.

Pure functions over text; nothing here opens a connection, reads the environment or asks the
system who runs it. An address is `unix:/path`, a bare absolute path, or `host:port`.
"""

from __future__ import annotations

from collections.abc import Mapping

from hotbay.errors import EndpointInvalid

SOCKET_NAME = "control.sock"
SYSTEM_RUNTIME_DIRECTORY = "/run/hotbay"
# The kernel's sockaddr_un holds 108 bytes, the last of which is a zero.
UNIX_PATH_BYTES_MAX = 107
PORT_MAX = 65535


def default_endpoint(user_id: int, environment: Mapping[str, str]) -> str:
    """The control socket of the daemon that `user_id` would run without naming directories."""
    if user_id == 0:
        return f"unix:{SYSTEM_RUNTIME_DIRECTORY}/{SOCKET_NAME}"
    runtime = environment.get("XDG_RUNTIME_DIR") or f"/run/user/{user_id}"
    return f"unix:{runtime}/hotbay/{SOCKET_NAME}"


def target_of(endpoint: str) -> str:
    """The gRPC target of an address as people write it. Raises EndpointInvalid."""
    text = endpoint.strip()
    if text.startswith("/"):
        text = f"unix:{text}"
    if text.startswith("unix:"):
        return f"unix:{_unix_path(endpoint, text.removeprefix('unix:'))}"
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) <= PORT_MAX:
        raise EndpointInvalid(
            f"the endpoint {endpoint!r} is neither unix:/path/to/socket nor host:port"
        )
    return text


def _unix_path(endpoint: str, path: str) -> str:
    if path.startswith("//"):  # unix:///path, as URLs are written
        path = path[2:]
    if not path.startswith("/"):
        raise EndpointInvalid(f"the endpoint {endpoint!r} must name its socket by an absolute path")
    if len(path.encode()) > UNIX_PATH_BYTES_MAX:
        raise EndpointInvalid(
            f"the socket path of {endpoint!r} has {len(path.encode())} bytes; the system allows "
            f"{UNIX_PATH_BYTES_MAX}: use a shorter runtime directory"
        )
    return path
