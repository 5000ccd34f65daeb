"""Log-probabilities in the two forms that OpenAI's API has for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sagellm.core.step_executor import TokenLogprobs
from sagellm.server.tokenization.tokenizer import Tokenizer

# JSON has no infinity: a token that cannot come gets a number that is as good.
_LOWEST = -9999.0


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The completions form. ``text_offset`` counts characters of token texts from the answer's start."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """The chat form."""

    content: list[ChatTokenLogprob]


@dataclass(frozen=True, slots=True)
class TokenSpelling:
    """How tokens are written in log-probabilities: as text, or as ``token_id:7``."""

    tokenizer: Tokenizer
    as_ids: bool

    def name(self, token_id: int) -> str:
        if self.as_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def bytes(self, token_id: int) -> list[int]:
        return list(self.tokenizer.token_bytes(token_id))


def completion_logprobs(
    logprobs: Sequence[TokenLogprobs], num_top: int, spelling: TokenSpelling, offset: int
) -> CompletionLogprobs:
    """The completions form of these tokens, of which the first begins at ``offset``."""
    tokens = [spelling.name(each.token_ids[0]) for each in logprobs]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[_finite(each.logprobs[0]) for each in logprobs],
        top_logprobs=[_alternatives(each, num_top, spelling) for each in logprobs],
        text_offset=offsets,
    )


def _alternatives(token: TokenLogprobs, num_top: int, spelling: TokenSpelling) -> dict[str, float]:
    """The drawn token and the most likely ones; where two are written alike, the likelier one is kept."""
    found: dict[str, float] = {}
    for token_id, logprob in list(zip(token.token_ids, token.logprobs, strict=True))[: num_top + 1]:
        name = spelling.name(token_id)
        found[name] = max(_finite(logprob), found.get(name, _LOWEST))
    return found


def chat_logprobs(logprobs: Sequence[TokenLogprobs], num_top: int, spelling: TokenSpelling) -> ChatLogprobs:
    """The chat form of these tokens."""
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token=spelling.name(each.token_ids[0]),
                logprob=_finite(each.logprobs[0]),
                bytes=spelling.bytes(each.token_ids[0]),
                top_logprobs=[
                    TopLogprob(spelling.name(token_id), _finite(logprob), spelling.bytes(token_id))
                    for token_id, logprob in zip(
                        each.token_ids[1 : num_top + 1], each.logprobs[1 : num_top + 1], strict=True
                    )
                ],
            )
            for each in logprobs
        ]
    )


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
