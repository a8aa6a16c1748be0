"""The gateway's configuration: every limit by its name, with its unit and its bounds.

hotbayd passes it once, on the command line; what may change while the gateway runs comes with each
table (`GatewayLimits`). Nothing here is read from the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from daemon.gateway.errors import ConfigInvalid

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a gateway is started with."""

    generation: Annotated[int, Meta(ge=0)] = 0
    """Which start of the gateway this is, as hotbayd counts."""
    body_bytes_max: Positive = 8 << 20
    body_timeout_s: Seconds = 30.0
    open_requests_max: Positive = 4096
    """Completion requests at a time; one more is answered 503."""
    request_timeout_s: Seconds = 3600.0
    """Longest life of one request, holding included."""
    output_tokens_default: Positive = 4096
    """Bound of max_tokens where the client gives none; the rest of the context bounds it too."""
    sequences_per_request_max: Positive = 128
    """Prompts times n."""
    tokenizers_max: Positive = 16
    """Tokenizers kept in memory."""
    segments_max: Positive = 4096
    keep_alive_timeout_s: Positive = 75
    drain_timeout_s: Annotated[float, Meta(ge=0, le=86_400)] = 10.0
    """How long SIGTERM lets open requests run."""
    log_level: str = "INFO"


def read_config(text: str | None) -> GatewayConfig:
    """Parse `--config-json`: a JSON object, or the path of a file that holds one.

    Raises ConfigInvalid, which names the field.
    """
    if text is None:
        return GatewayConfig()
    try:
        body = text.encode() if text.lstrip().startswith("{") else Path(text).read_bytes()
        return msgspec.json.decode(body, type=GatewayConfig)
    except OSError as error:
        raise ConfigInvalid(f"--config-json: cannot read {text}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigInvalid(f"--config-json: {error}") from error
