"""From a decoded body to a job: everything checked, ready to be handed to workers.

It brings the route, the tokenizer, the prompts and the sampling together and raises for whatever is
wrong with the request; it opens no stream. Invariant: a job that exists can be run as it stands.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

import msgspec

from daemon.gateway.config import GatewayConfig
from daemon.gateway.errors import BadRequest
from daemon.gateway.openai.choice import Choice
from daemon.gateway.openai.chunks import ChatStyle, CompletionStyle, Style, Usage
from daemon.gateway.openai.fields import ChatFields, CommonFields, CompletionFields
from daemon.gateway.openai.prompts import (
    Prompt,
    chat_prompt,
    check_vocabulary,
    completion_prompts,
)
from daemon.gateway.openai.salt import prefix_salt
from daemon.gateway.openai.sampling import make_sampling, sample_seeds, stop_strings
from daemon.gateway.tokens.tokenizer import ModelTokenizer
from engine.link.routes import Route
from engine.link.tokens import Sampling


@dataclass(frozen=True)
class Job:
    """A checked request. Choices and sequences share their order: prompt by prompt."""

    model: str
    """The key it runs on, `name@version`."""
    route: Route
    prompts: list[Prompt]
    sequences: list[tuple[Prompt, Sampling]]
    choices: list[Choice]
    style: Style
    priority: int
    cache_salt: str
    """Prefixes are shared with requests of the same salt only."""
    stream: bool
    stops: bool
    """Whether there are stop strings, which only the gateway sees."""
    include_usage: bool

    def usage(self) -> Usage:
        """What was counted so far."""
        return Usage(
            prompt_tokens=sum(map(len, self.prompts)),
            completion_tokens=sum(choice.tokens for choice in self.choices),
            cached_tokens=self._cached_tokens(),
        )

    def _cached_tokens(self) -> int:
        """Of each prompt, what was found before any of its own samples computed it."""
        samples = len(self.choices) // len(self.prompts)
        found = [choice.cached_tokens for choice in self.choices]
        return sum(min(found[at : at + samples]) for at in range(0, len(found), samples))


async def chat_job(
    fields: ChatFields,
    route: Route,
    tokenizer: ModelTokenizer,
    config: GatewayConfig,
    authorization: bytes | None = None,
) -> Job:
    """The job of a chat request; `authorization` is its header. Raises BadRequest."""
    prompt = await chat_prompt(fields, tokenizer, route.context_tokens)
    salt = prefix_salt(authorization, fields.cache_salt)
    return _job(fields, route, tokenizer, config, [prompt], salt, ChatStyle, "chatcmpl-")


async def completion_job(
    fields: CompletionFields,
    route: Route,
    tokenizer: ModelTokenizer,
    config: GatewayConfig,
    authorization: bytes | None = None,
) -> Job:
    """The job of a completion request; `authorization` is its header. Raises BadRequest."""
    prompts = await completion_prompts(
        fields,
        tokenizer,
        route.context_tokens,
        prompts_max=config.sequences_per_request_max,
    )
    salt = prefix_salt(authorization, fields.cache_salt)
    return _job(fields, route, tokenizer, config, prompts, salt, CompletionStyle, "cmpl-")


def _job(
    fields: CommonFields,
    route: Route,
    tokenizer: ModelTokenizer,
    config: GatewayConfig,
    prompts: list[Prompt],
    cache_salt: str,
    style: type[ChatStyle] | type[CompletionStyle],
    prefix: str,
) -> Job:
    sequences = _sequences(fields, route, tokenizer, config, prompts)
    stops = stop_strings(fields)
    logprobs = sequences[0][1].logprobs is not None
    options = fields.stream_options
    include_usage = bool(options is not None and options.include_usage)
    return Job(
        model=route.model,
        route=route,
        prompts=prompts,
        sequences=sequences,
        choices=[
            Choice(index, tokenizer.detokenizer(), stops, logprobs=logprobs)
            for index in range(len(sequences))
        ],
        style=style(
            identifier=prefix + uuid.uuid4().hex,
            created_s=int(time.time()),
            model=fields.model,
            tokenizer=tokenizer,
            choices=len(sequences),
            logprobs=logprobs,
            include_usage=include_usage,
        ),
        priority=fields.priority or 0,
        cache_salt=cache_salt,
        stream=bool(fields.stream),
        stops=bool(stops),
        include_usage=include_usage,
    )


def _sequences(
    fields: CommonFields,
    route: Route,
    tokenizer: ModelTokenizer,
    config: GatewayConfig,
    prompts: list[Prompt],
) -> list[tuple[Prompt, Sampling]]:
    samples = fields.n or 1
    count = samples * len(prompts)
    if count > config.sequences_per_request_max:
        raise BadRequest(
            f"n: {samples} samples of {len(prompts)} prompts are {count} sequences; at most "
            f"{config.sequences_per_request_max} go in one request",
            param="n",
        )
    check_vocabulary(fields.stop_token_ids or (), "stop_token_ids", tokenizer)
    check_vocabulary(tuple(fields.logit_bias or ()), "logit_bias", tokenizer)
    # A given seed gives the same samples for every prompt; drawn ones differ throughout.
    seeds = sample_seeds(fields.seed, count if fields.seed is None else samples)
    sequences: list[tuple[Prompt, Sampling]] = []
    for prompt in prompts:
        sampling = make_sampling(
            fields,
            prompt_tokens=len(prompt),
            context_tokens=route.context_tokens,
            output_tokens_default=config.output_tokens_default,
        )
        for _ in range(samples):
            seed = seeds[len(sequences) % len(seeds)]
            sequences.append((prompt, msgspec.structs.replace(sampling, seed=seed)))
    return sequences
