"""Answers of ``/v1/completions``: ``text_completion`` objects."""

from collections.abc import Sequence
from itertools import chain

import msgspec
from msgspec import UNSET, UnsetType

from sagellm.server.openai.answers import Answers, Usage
from sagellm.server.openai.generation import Piece
from sagellm.server.openai.logprobs import CompletionLogprobs, TokenSpelling, completion_logprobs
from sagellm.server.openai.options import GenerationOptions
from sagellm.server.tokenization.tokenizer import Tokenizer


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """The whole body, or one streamed chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class CompletionForm:
    """An `AnswerForm`. The prompt goes before the text where ``echo`` is asked for."""

    def __init__(
        self, answers: Answers, options: GenerationOptions, tokenizer: Tokenizer, model_name: str, echo: bool
    ) -> None:
        self._answers = answers
        self._options = options
        self._tokenizer = tokenizer
        self._model_name = model_name
        self._echo = echo
        self._spelling = TokenSpelling(tokenizer, options.tokens_as_ids)
        self._offsets: dict[int, int] = {}  # by answer: characters of the token texts so far; begun answers only

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> Sequence[Completion]:
        """One chunk."""
        is_first = index not in self._offsets
        return (self._completion([self._choice(index, [piece], is_first)], UNSET if usage is None else usage),)

    def usage_chunk(self, usage: Usage) -> Completion:
        """A chunk of usage only."""
        return self._completion([], usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> Completion:
        """The body with all choices."""
        return self._completion([self._choice(index, each, True) for index, each in enumerate(pieces)], usage)

    def _completion(self, choices: Sequence[CompletionChoice], usage: Usage | UnsetType) -> Completion:
        answers = self._answers
        return Completion(answers.request_id, "text_completion", answers.created_s, self._model_name, choices, usage)

    def _choice(self, index: int, pieces: Sequence[Piece], is_first: bool) -> CompletionChoice:
        text = "".join(piece.text for piece in pieces)
        finish = pieces[-1].finish
        if is_first:
            self._offsets[index] = 0
            text = self._prompt_text(index) + text if self._echo else text
        wants_ids = self._options.return_token_ids
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, pieces),
            finish_reason=None if finish is None else finish.reason,
            stop_reason=None if finish is None else finish.stop_reason,
            token_ids=list(chain.from_iterable(piece.token_ids for piece in pieces)) if wants_ids else UNSET,
            prompt_token_ids=self._answers.prompt_of(index).token_ids if wants_ids and is_first else UNSET,
        )

    def _prompt_text(self, index: int) -> str:
        prompt = self._answers.prompt_of(index)
        if prompt.text is not None and self._options.truncate_prompt_tokens is None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, self._options.skip_special_tokens)

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> CompletionLogprobs | None:
        num_top = self._options.sampling.num_logprobs
        if num_top is None:
            return None
        given = list(chain.from_iterable(piece.logprobs for piece in pieces))
        logprobs = completion_logprobs(given, num_top, self._spelling, self._offsets[index])
        self._offsets[index] += sum(map(len, logprobs.tokens))
        return logprobs
