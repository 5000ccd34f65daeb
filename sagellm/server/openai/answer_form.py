"""What completions and chat answers have in common, for the code that sends either."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from sagellm.server.openai.answers import Usage
from sagellm.server.openai.generation import Piece


class AnswerForm(Protocol):
    """One request's answers in the words of its kind of API."""

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> Sequence[msgspec.Struct]:
        """The streamed chunks that a piece becomes: one, with what goes before an answer's first."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The chunk with no choices that ends a stream where usage was asked for."""

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> msgspec.Struct:
        """The body that is not streamed: one choice for each answer, made of its pieces."""
