"""A tokeniser for models that have none: a token is a byte of UTF-8."""

from collections.abc import Sequence

from sagellm.server.tokenization.chat_template import ChatTemplate
from sagellm.server.tokenization.text_streams import ByteTextStream, TextStream

END_TOKEN_ID = 256
"""Ends an answer. Ids above stand for nothing, so a model may have more."""

_END_NAME = b"<|end|>"
_BYTES = tuple(bytes([value]) for value in range(256))

PLAIN_CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- message['role'] + ': ' + message['content'] + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


class ByteTokenizer:
    """Ids 0 to 255 are bytes, `END_TOKEN_ID` is the end, ids above have no text."""

    def __init__(self, chat_template: str | None = None) -> None:
        self._chat_template = ChatTemplate(chat_template or PLAIN_CHAT_TEMPLATE, {"eos_token": _END_NAME.decode()})

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (END_TOKEN_ID,)

    @property
    def chat_template(self) -> ChatTemplate:
        return self._chat_template

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The text's bytes; there is nothing to add."""
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The bytes as text."""
        stream = self.text_stream(skip_special_tokens)
        return stream.push(token_ids) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The byte, or the special token's name."""
        if token_id < END_TOKEN_ID:
            return _BYTES[token_id]
        return _END_NAME if token_id == END_TOKEN_ID else b"<|%d|>" % token_id

    def token_name(self, token_id: int) -> str:
        """The byte in hexadecimal, or the special token's name."""
        return f"<0x{token_id:02X}>" if token_id < END_TOKEN_ID else self.token_bytes(token_id).decode()

    def text_stream(self, skip_special_tokens: bool) -> TextStream:
        """A decoder of one answer."""
        return ByteTextStream(_text_bytes if skip_special_tokens else self.token_bytes)


def _text_bytes(token_id: int) -> bytes:
    return _BYTES[token_id] if token_id < END_TOKEN_ID else b""
