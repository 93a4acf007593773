"""Qwen2.5's chat format as a Jinja template, and the sandbox in which any folder's own template is run.

A turn is `<|im_start|>ROLE`, a newline, the text, `<|im_end|>` and a newline. Without a system message first the
default one is used. Tools are described in the system turn and called in the Hermes style; the results of
consecutive `tool` messages share one user turn.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_qwen.errors import ConfigError

QWEN_CHAT_TEMPLATE = r"""
{%- set default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." %}
{%- set given = messages and messages[0].role == "system" %}
{%- set system = messages[0].content if given else default_system %}
{{- "<|im_start|>system\n" + system }}
{%- if tools %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" ~ (tool | tojson) }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments " }}
    {{- "within <tool_call></tool_call> XML tags:\n<tool_call>\n" }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}' ~ "\n</tool_call>" }}
{%- endif %}
{{- "<|im_end|>\n" }}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or loop.previtem.role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\n<tool_response>\n" + message.content + "\n</tool_response>" }}
        {%- if loop.last or loop.nextitem.role != "tool" %}
            {{- "<|im_end|>\n" }}
        {%- endif %}
    {%- elif message.role == "assistant" and message.tool_calls %}
        {{- "<|im_start|>assistant" }}
        {%- if message.content %}
            {{- "\n" + message.content }}
        {%- endif %}
        {%- for entry in message.tool_calls %}
            {%- set call = entry.function if entry.function is defined else entry %}
            {{- "\n<tool_call>\n" ~ '{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- (call.arguments | tojson) ~ "}\n</tool_call>" }}
        {%- endfor %}
        {{- "<|im_end|>\n" }}
    {%- elif message.role not in ["user", "assistant", "system"] %}
        {{- raise_exception("unknown role " ~ message.role ~ "; expected system, user, assistant or tool") }}
    {%- elif not (given and loop.first) %}
        {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}
""".strip()


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Return the text of a conversation.

    The template may come with a stranger's checkpoint: it runs in Jinja's immutable sandbox, without access to
    attributes, files or modules.

    Raises:
        ConfigError: the template is malformed, refuses the messages, or does what the sandbox forbids.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=list(messages),
            tools=list(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (jinja2.TemplateError, TypeError, LookupError) as error:
        raise ConfigError(f"the chat template cannot render these messages: {error}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes <, > and & for HTML; a prompt must carry them as they are.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
