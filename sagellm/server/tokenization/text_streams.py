"""Decoding an answer piece by piece: pieces joined are the text of the whole."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol


class TextStream(Protocol):
    """One answer's decoder. A piece never ends within a character: what is incomplete waits for more tokens."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def flush(self) -> str:
        """What still waits, at the answer's end."""


class ByteTextStream:
    """For vocabularies whose tokens are runs of bytes: exact, at the cost of a look-up for each token."""

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        return self._decoder.decode(b"".join(map(self._token_bytes, token_ids)))

    def flush(self) -> str:
        """What still waits, at the answer's end."""
        return self._decoder.decode(b"", final=True)


# A character has at most four bytes, so bytes that are incomplete after so many tokens will never be complete.
_WAITING_TOKENS_MAX = 8


class WindowTextStream:
    """For any other vocabulary: decodes a few tokens with and without the newest, and gives the difference.

    What a token means may depend on the one before (a space that is dropped at the start), so the
    window begins with tokens whose text is out already.
    """

    __slots__ = ("_decode", "_num_out", "_skipped", "_text_out", "_window")

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: frozenset[int]) -> None:
        self._decode = decode
        self._skipped = skipped  # ids that have no text; a window must not begin with them
        self._window: list[int] = []
        self._num_out = 0  # tokens of the window whose text is out
        self._text_out = ""  # their text

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        return "".join(self._push_one(token_id) for token_id in token_ids if token_id not in self._skipped)

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        is_complete = len(text) > len(self._text_out) and not text.endswith("\ufffd")
        if not is_complete and len(self._window) - self._num_out < _WAITING_TOKENS_MAX:
            return ""
        piece = text[len(self._text_out) :]
        del self._window[: self._num_out]
        self._num_out = len(self._window)
        self._text_out = self._decode(self._window)
        return piece

    def flush(self) -> str:
        """What still waits, at the answer's end."""
        piece = self._decode(self._window)[len(self._text_out) :]
        self._num_out, self._text_out = len(self._window), self._text_out + piece
        return piece
