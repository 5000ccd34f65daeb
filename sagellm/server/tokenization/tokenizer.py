"""What the server asks of a tokeniser."""

from collections.abc import Sequence
from typing import Protocol

from sagellm.server.tokenization.chat_template import ChatTemplate
from sagellm.server.tokenization.text_streams import TextStream


class TokenizerError(ValueError):
    """A tokeniser's files are missing or cannot be read."""


class Tokenizer(Protocol):
    """Calls are safe from several threads at once."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""

    @property
    def chat_template(self) -> ChatTemplate:
        """Makes a prompt of a conversation."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of the text; with the tokens that the model wants around a prompt, where asked for."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of the ids. Bytes that are no UTF-8 come out as U+FFFD, ids that mean nothing as nothing."""

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for by itself, special tokens their name; it need not be whole characters."""

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""

    def text_stream(self, skip_special_tokens: bool) -> TextStream:
        """A decoder of one answer, from its first token on."""
