"""Chat templates: Jinja text in a model's folder that makes a prompt of messages, as Hugging Face defines them."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

JsonValue = object
"""What a JSON text parses to: templates get messages, tools and documents as they came."""


class ChatTemplateError(ValueError):
    """The template does not take these messages, or is none."""


class _GenerationTag(Extension):
    """``{% generation %}`` marks an answer's text for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja looks for a set of this name

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: JsonValue,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(text_format: str) -> str:
    return datetime.now().strftime(text_format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=64)
def _compiled(text: str) -> Template:
    return _environment().from_string(text)


class ChatTemplate:
    """One model's template and the special tokens that it names (``bos_token``, ``eos_token`` and others)."""

    def __init__(self, text: str | None, special_tokens: Mapping[str, str]) -> None:
        self._text = text
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, JsonValue]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template: str | None = None,
        variables: Mapping[str, JsonValue] | None = None,
    ) -> str:
        """The prompt. ``variables`` are what else the template may name: tools, documents, keyword arguments.

        Raises ChatTemplateError where there is no template, it is no Jinja, or it refuses the messages.
        """
        text = template or self._text
        if text is None:
            raise ChatTemplateError("the model has no chat template; send the prompt to /v1/completions")
        values: dict[str, JsonValue] = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        rendered = _rendered(text, values)
        return _cut_after_final_message(rendered, messages) if continue_final_message else rendered


def _rendered(text: str, values: Mapping[str, JsonValue]) -> str:
    render: Callable[..., str]
    try:
        render = _compiled(text).render
        return render(values)
    except TemplateError as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ChatTemplateError(f"the chat template cannot take these messages: {error}") from error


def _cut_after_final_message(rendered: str, messages: Sequence[Mapping[str, JsonValue]]) -> str:
    """The prompt without what the template puts behind the last message, so that the model goes on with it."""
    content = messages[-1].get("content")
    if not isinstance(content, str) or not content.strip():
        raise ChatTemplateError("continue_final_message needs a last message with text")
    for text in (content, content.strip()):
        start = rendered.rfind(text)
        if start >= 0:
            return rendered[: start + len(text)]
    raise ChatTemplateError("the chat template changes the last message's text, so it cannot be continued")
