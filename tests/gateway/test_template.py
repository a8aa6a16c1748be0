"""Chat templates against transformers' own rendering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from daemon.gateway.errors import BadRequest, TokenizerUnusable
from daemon.gateway.tokens.template import ChatTemplate, read_template
from tests.gateway.conftest import TEMPLATE, make_model

TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
MESSAGES = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "Hi “there”\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "你好?"},
]
TEMPLATES = {
    "plain": TEMPLATE,
    "blocks": """
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}
{{ bos_token + message.content | trim }}
        {% continue %}
    {%- endif %}
    {{- '[' + message.role + ']' }}
    {% generation %}{{ message.content }}{% endgeneration %}
{%- endfor %}
{% if add_generation_prompt %}>>{% endif %}
""",
    "json": "{{ messages | tojson(indent=2) }}{{ messages[0] | tojson }}{{ tools is none }}",
    "namespace": (
        "{% set ns = namespace(count=0) %}{% for m in messages %}{% set ns.count = ns.count + 1 %}"
        "{% if ns.count == 3 %}{% break %}{% endif %}{% endfor %}{{ ns.count }}{{ eos_token }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(name: str, model_directory: Path) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(model_directory / "tokenizer.json"), **TOKENS
    )
    expected = oracle.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(MESSAGES, {}) == expected


def test_the_templates_own_words_reach_the_client() -> None:
    with pytest.raises(BadRequest, match="Unknown role wizard") as caught:
        ChatTemplate(TEMPLATE, TOKENS).render([{"role": "wizard", "content": "x"}], {})
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages + 1 }}",
        "{{ messages[0].content.no.such }}",
    ],
)
def test_what_a_template_may_not_do_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(BadRequest):
        ChatTemplate(source, {}).render(MESSAGES, {})


def test_variables_of_the_client_cannot_replace_the_templates() -> None:
    template = ChatTemplate("{{ bos_token }}{{ enable_thinking }}{{ messages | length }}", TOKENS)
    variables: dict[str, Any] = {"enable_thinking": False, "messages": [], "bos_token": "no"}
    assert template.render(MESSAGES, variables) == "<|begin|>False4"


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    make_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file{{ eos_token }}")
    template = read_template(tmp_path)
    assert template is not None
    assert template.render(MESSAGES, {}) == "from the file<|end|>"


def test_named_templates_mean_the_default_one(tmp_path: Path) -> None:
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "the default"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = read_template(tmp_path)
    assert template is not None
    assert template.render(MESSAGES, {}) == "the default"


def test_no_template_is_no_error_and_a_broken_one_is(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(TokenizerUnusable, match="chat template in"):
        read_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerUnusable, match=r"tokenizer_config\.json"):
        read_template(tmp_path)
