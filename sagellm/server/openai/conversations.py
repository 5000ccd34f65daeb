"""Messages to the text of a prompt, as the model's chat template has it."""

from typing import Any

import msgspec

from sagellm.server.openai.body_reading import shortened
from sagellm.server.openai.errors import invalid
from sagellm.server.openai.options import check
from sagellm.server.openai.request_bodies import ChatBody, TokenizeBody
from sagellm.server.tokenization.chat_template import ChatTemplate, ChatTemplateError

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = ("text", "input_text", "output_text")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")


def chat_prompt(body: ChatBody | TokenizeBody, chat_template: ChatTemplate, trusts_clients: bool) -> str:
    """The prompt's text. Raises ApiError (400) for messages that are malformed or that the template refuses."""
    if not body.messages:
        raise invalid("messages", "messages: missing or empty, must be a list of one message or more")
    messages = [_message(message, index) for index, message in enumerate(body.messages)]
    continues = bool(body.continue_final_message)
    adds_prompt = body.add_generation_prompt is not False
    if continues and body.add_generation_prompt:
        raise invalid(
            "continue_final_message", "continue_final_message: true, must be false where add_generation_prompt is true"
        )
    if body.chat_template is not None and not trusts_clients:
        raise invalid("chat_template", "chat_template: present, must be absent: clients' own are not trusted here")
    try:
        return chat_template.render(
            messages,
            add_generation_prompt=adds_prompt and not continues,
            continue_final_message=continues,
            template=body.chat_template,
            variables=_variables(body),
        )
    except ChatTemplateError as error:
        raise invalid("messages", f"messages: {error}") from error


def _variables(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    for name in _RESERVED:
        if name in variables:
            raise invalid("chat_template_kwargs", f"chat_template_kwargs: names {name}, which is a field of its own")
    if body.tools:
        variables["tools"] = body.tools
    if isinstance(body, ChatBody):
        if body.documents is not None:
            variables["documents"] = body.documents
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
    return variables


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """The message with its content as one text, and with tool calls as templates expect them."""
    where = f"messages[{index}]"
    role = message.get("role")
    if role not in _ROLES:
        raise invalid("messages", f"{where}.role: {shortened(role)}, must be one of {', '.join(_ROLES)}")
    read = dict(message, content=_text(message.get("content"), where, may_be_absent=role == "assistant"))
    if message.get("tool_calls"):
        read["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return read


def _text(content: Any, where: str, may_be_absent: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_absent:
        return ""
    if not isinstance(content, list):
        raise invalid("messages", f"{where}.content: {shortened(content)}, must be a text or a list of text parts")
    texts: list[str] = []
    for number, part in enumerate(content):
        is_text = isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
        if not is_text:
            raise invalid(
                "messages", f'{where}.content[{number}]: {shortened(part)}, must be {{"type": "text", "text": ...}}'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as an object; OpenAI's API sends them as JSON in a string."""
    check(isinstance(calls, list), f"{where}.tool_calls", calls, "a list")
    read: list[dict[str, Any]] = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise invalid("messages", f"{where}.tool_calls[{number}]: {shortened(call)}, must have a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = msgspec.json.decode(arguments) if arguments else {}
            except msgspec.DecodeError as error:
                raise invalid(
                    "messages", f"{where}.tool_calls[{number}].function.arguments: {shortened(arguments)}, must be JSON"
                ) from error
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read
