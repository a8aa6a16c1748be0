"""Messages between the gateway and a worker (`RUNTIME_DIR/workers/<partition>/tokens.sock`).

The worker listens, the gateway connects. All tokens of one engine step travel in one `Step`; the
worker may have STEP_FRAMES_CREDIT frames on the way that the gateway has not granted back, and
stops stepping beyond that. Text never crosses this link: the gateway tokenises and detokenises.
When the link breaks the worker forgets every request that came over it, and the gateway replays
those of which no token had arrived.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

STEP_FRAMES_CREDIT = 256
LOGPROBS_MAX = 20
STOP_TOKENS_MAX = 64
LOGIT_BIAS_MAX = 300


class Sampling(msgspec.Struct, frozen=True):
    """How the tokens of one request are drawn; the gateway has checked every bound."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """The draw at each position depends on (seed, position) alone; the gateway picks one if the
    client gave none."""
    logprobs: int | None = None
    """None: none; 0: of the sampled token; n: also of the n likeliest."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: dict[int, float] = {}


class Finish(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # end-of-sequence or a stop token, which is not among the tokens
    LENGTH = "length"
    ABORT = "abort"  # cancelled, or ended by a swap with the abort policy
    ERROR = "error"
    REQUEUE = "requeue"  # not run here and no token sent: hold it until the route is open again


# Gateway to worker.


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a request. `request` is unique for the life of the link."""

    request: int
    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int = 0
    """Lower runs first, as in vLLM."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt (one per tenant)."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Forget a request and free its KV within the step. Unknown requests are ignored."""

    request: int


class Grant(msgspec.Struct, frozen=True, tag=True):
    """The gateway took this many Step frames off the link."""

    frames: int


# Worker to gateway.


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log probability of a drawn token, and of the likeliest others, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought one request: new tokens, and how it ended if it did."""

    request: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token where logprobs were asked for, else empty."""
    finish: Finish | None = None
    error: str = ""
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in the prefix cache; with the first output."""


class Step(msgspec.Struct, frozen=True, tag=True):
    """The outputs of one step of one engine."""

    outputs: tuple[Output, ...]


ToWorker = Submit | Cancel | Grant
FromWorker = Step
