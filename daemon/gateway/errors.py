"""Errors of the gateway, and the HTTP answer each of them means.

    GatewayError
    ├── StartFailed              the process cannot start; `exit_code` is what it ends with
    │   ├── ConfigInvalid
    │   ├── AddressTaken
    │   └── AlreadyRunning
    ├── SegmentRefused           a descriptor that hotbayd handed over or asked for
    └── RequestFailed            one request; all others go on
        ├── BadRequest           400, names the field
        ├── NotFound             404, no such path or model
        ├── MethodNotAllowed     405
        ├── BodyTimedOut         408
        ├── BodyTooLarge         413
        ├── ClientGone           499, never sent: there is nobody to read it
        ├── EngineFailed         500, the worker could not run it
        ├── TokenizerUnusable    500, the model's directory lacks what the gateway reads from it
        ├── WorkerLost           502, the worker ended after it had sent tokens
        ├── Unavailable          503 with Retry-After: hold full or over, refused, draining, aborted
        └── DeadlinePassed       504

`RequestFailed` says what an OpenAI client sees: `status`, `kind` (OpenAI's `type`), `code` and
`param`.
"""

from __future__ import annotations

from typing import ClassVar


class GatewayError(Exception):
    """Anything the gateway refuses or fails at."""


class StartFailed(GatewayError):
    """The process cannot start; the message says what to change."""

    exit_code: ClassVar[int] = 1


class ConfigInvalid(StartFailed):
    """The configuration does not parse, or a limit is out of its bounds."""

    exit_code = 2


class AddressTaken(StartFailed):
    """An address cannot be listened on. Choose another, or end the process that holds it."""

    exit_code = 3


class AlreadyRunning(StartFailed):
    """Another gateway runs in this runtime directory."""

    exit_code = 4


class SegmentRefused(GatewayError):
    """A segment's descriptor is missing, unknown or one too many."""


class RequestFailed(GatewayError):
    """One request ends with an error. `code` overrides the class's own where it says more."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class BadRequest(RequestFailed):
    """The request is wrong; `param` names the field."""

    status = 400
    kind = "invalid_request_error"


class NotFound(RequestFailed):
    """There is no such path or model."""

    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(RequestFailed):
    """The path exists, for another method."""

    status = 405
    kind = "invalid_request_error"
    code = "method_not_allowed"


class BodyTimedOut(RequestFailed):
    """The body did not arrive in time."""

    status = 408
    kind = "invalid_request_error"
    code = "request_timeout"


class BodyTooLarge(RequestFailed):
    """The body is over the limit."""

    status = 413
    kind = "invalid_request_error"
    code = "body_too_large"


class ClientGone(RequestFailed):
    """The client closed its connection; its streams are cancelled and nothing is answered."""

    status = 499
    code = "client_closed_request"


class EngineFailed(RequestFailed):
    """The engine could not run this request."""

    status = 500
    code = "engine_error"


class TokenizerUnusable(RequestFailed):
    """The model's tokenizer or chat template cannot be read."""

    status = 500
    code = "tokenizer_unusable"


class WorkerLost(RequestFailed):
    """The worker ended while it was answering. Send the request again."""

    status = 502
    code = "worker_lost"


class Unavailable(RequestFailed):
    """The model cannot be served now; `Retry-After` says when it is worth another try."""

    status = 503
    code = "model_unavailable"


class DeadlinePassed(RequestFailed):
    """The request took longer than the gateway allows any request."""

    status = 504
    kind = "timeout_error"
    code = "deadline_passed"
