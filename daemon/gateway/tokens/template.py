"""Chat templates: messages to the prompt a model was trained on, as transformers renders them.

Templates come from model directories and run in Jinja's immutable sandbox; the environment offers
what templates in use expect (`raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop
controls, the `generation` block) and nothing else. A compiled template is shared; rendering changes
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from daemon.gateway.errors import BadRequest, TokenizerUnusable

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the model's own turns for training; here it shows its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads this attribute from the class

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """One model's template with its special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        self._template = environment.from_string(source)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt of a conversation, up to where the model's answer begins.

        `variables` are the client's own; they cannot replace the template's. Raises BadRequest with
        the template's own words where it refuses the messages.
        """
        try:
            return self._template.render(
                {
                    **variables,
                    "tools": None,
                    "documents": None,
                    **self._special_tokens,
                    "messages": messages,
                    "add_generation_prompt": True,
                }
            )
        except jinja2.TemplateError as error:
            raise BadRequest(f"the model's chat template: {error}", param="messages") from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise BadRequest(
                f"the model's chat template does not take these messages: {error}",
                param="messages",
            ) from error


def read_template(directory: Path) -> ChatTemplate | None:
    """The template of a checkpoint, from its own file or tokenizer_config.json; None if neither.

    Raises TokenizerUnusable when it is there and cannot be read or compiled.
    """
    config = _read_json(directory / "tokenizer_config.json")
    source = config.get("chat_template")
    file = directory / TEMPLATE_FILE
    if file.exists():
        source = file.read_text(encoding="utf-8")
    if isinstance(source, list):  # several, by name: the default one
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        return None
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    try:
        return ChatTemplate(source, tokens)
    except jinja2.TemplateError as error:
        raise TokenizerUnusable(f"the chat template in {directory} is invalid: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerUnusable(f"cannot read {file}: {error}") from error
    return content if isinstance(content, dict) else {}
