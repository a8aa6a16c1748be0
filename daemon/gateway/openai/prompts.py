"""From request fields to token ids: conversations, texts and ready-made ids.

It renders, encodes and checks prompts, and nothing else. Invariant: every prompt it returns has at
least one token, only ids of the vocabulary, and leaves room for at least one token of output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from daemon.gateway.errors import BadRequest
from daemon.gateway.openai.fields import ChatFields, CompletionFields
from daemon.gateway.tokens.tokenizer import ModelTokenizer

Prompt = tuple[int, ...]


async def chat_prompt(fields: ChatFields, tokenizer: ModelTokenizer, context_tokens: int) -> Prompt:
    """The prompt of a conversation. Raises BadRequest."""
    if tokenizer.template is None:
        raise BadRequest(
            "messages: this model has no chat template; use /v1/completions", param="messages"
        )
    messages = _messages(fields.messages)
    text = tokenizer.template.render(messages, fields.chat_template_kwargs or {})
    # The template writes the special tokens itself.
    prompt = await tokenizer.encode(text, add_special_tokens=False)
    _check(prompt, "messages", context_tokens)
    return prompt


async def completion_prompts(
    fields: CompletionFields, tokenizer: ModelTokenizer, context_tokens: int, *, prompts_max: int
) -> list[Prompt]:
    """The prompts of a completion: one text or list of ids, or several. Raises BadRequest."""
    given = fields.prompt
    prompts: list[str | list[int]]
    if isinstance(given, str):
        prompts = [given]
    elif given and all(isinstance(item, int) for item in given):
        prompts = [given]  # type: ignore[list-item]
    elif all(isinstance(item, str) for item in given) or all(
        isinstance(item, list) for item in given
    ):
        prompts = given  # type: ignore[assignment]
    else:
        raise BadRequest(
            "prompt: expected a text, a list of texts, a list of token ids, or a list of lists of "
            "token ids, not a mixture",
            param="prompt",
        )
    if not 1 <= len(prompts) <= prompts_max:
        raise BadRequest(
            f"prompt: expected 1 to {prompts_max} prompts, got {len(prompts)}", param="prompt"
        )
    encoded = []
    for place, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{place}]"
        if isinstance(prompt, str):
            if not prompt:
                raise BadRequest(f"{param}: the prompt is empty", param=param)
            tokens = await tokenizer.encode(prompt, add_special_tokens=True)
        else:
            tokens = tuple(prompt)
            check_vocabulary(tokens, param, tokenizer)
        _check(tokens, param, context_tokens)
        encoded.append(tokens)
    return encoded


def check_vocabulary(tokens: Sequence[int], param: str, tokenizer: ModelTokenizer) -> None:
    """Raise BadRequest unless all ids are of the vocabulary."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < tokenizer.vocabulary):
        raise BadRequest(
            f"{param}: token ids of this model are 0 to {tokenizer.vocabulary - 1}, got "
            f"{min(tokens)} to {max(tokens)}",
            param=param,
        )


def _check(tokens: Prompt, param: str, context_tokens: int) -> None:
    if not tokens:
        raise BadRequest(f"{param}: the prompt is empty", param=param)
    if len(tokens) >= context_tokens:
        raise BadRequest(
            f"{param}: the prompt has {len(tokens)} tokens; the model's context is "
            f"{context_tokens} tokens, and at least one must be left for the answer",
            param=param,
            code="context_length_exceeded",
        )


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not messages:
        raise BadRequest("messages: at least one message is needed", param="messages")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: dict[str, Any], path: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadRequest(f"{path}.role: expected a non-empty text", param=f"{path}.role")
    content = message.get("content")
    if isinstance(content, str):
        return message
    if content is None and role == "assistant" and message.get("tool_calls"):
        return message
    if not isinstance(content, list):
        raise BadRequest(
            f"{path}.content: expected a text or a list of text parts", param=f"{path}.content"
        )
    texts = []
    for place, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            where = f"{path}.content[{place}]"
            raise BadRequest(
                f'{where}: only parts of the form {{"type": "text", "text": "..."}} are supported',
                param=where,
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}
