"""Answers of ``/v1/chat/completions``: ``chat.completion`` objects and their chunks."""

from collections.abc import Sequence
from itertools import chain

import msgspec
from msgspec import UNSET, UnsetType

from sagellm.server.openai.answers import Answers, Usage
from sagellm.server.openai.generation import Piece
from sagellm.server.openai.logprobs import ChatLogprobs, TokenSpelling, chat_logprobs
from sagellm.server.openai.options import GenerationOptions
from sagellm.server.tokenization.tokenizer import Tokenizer


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None = None


class Delta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """The whole body, or one streamed chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChatChoice] | Sequence[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class ChatForm:
    """An `AnswerForm`. Each answer begins with a chunk that says whose it is, sent with its first token."""

    def __init__(self, answers: Answers, options: GenerationOptions, tokenizer: Tokenizer, model_name: str) -> None:
        self._answers = answers
        self._options = options
        self._model_name = model_name
        self._spelling = TokenSpelling(tokenizer, options.tokens_as_ids)
        self._begun: set[int] = set()

    def chunk(self, index: int, piece: Piece, usage: Usage | None) -> Sequence[ChatCompletion]:
        """One chunk, behind the role's where it is the answer's first."""
        choice = ChatChunkChoice(
            index=index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs([piece]),
            finish_reason=None if piece.finish is None else piece.finish.reason,
            stop_reason=None if piece.finish is None else piece.finish.stop_reason,
            token_ids=piece.token_ids if self._options.return_token_ids else UNSET,
        )
        chunk = self._chunk([choice], usage)
        if index in self._begun:
            return (chunk,)
        self._begun.add(index)
        role = ChatChunkChoice(index, Delta(role="assistant", content=""))
        return self._chunk([role], usage, self._prompt_token_ids()), chunk

    def usage_chunk(self, usage: Usage) -> ChatCompletion:
        """A chunk of usage only."""
        return self._chunk([], usage)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage) -> ChatCompletion:
        """The body with all choices."""
        choices = [self._choice(index, each) for index, each in enumerate(pieces)]
        answers = self._answers
        return ChatCompletion(
            answers.request_id,
            "chat.completion",
            answers.created_s,
            self._model_name,
            choices,
            usage,
            self._prompt_token_ids(),
        )

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        finish = pieces[-1].finish
        token_ids = chain.from_iterable(piece.token_ids for piece in pieces)
        return ChatChoice(
            index=index,
            message=Message("assistant", "".join(piece.text for piece in pieces)),
            logprobs=self._logprobs(pieces),
            finish_reason=None if finish is None else finish.reason,
            stop_reason=None if finish is None else finish.stop_reason,
            token_ids=list(token_ids) if self._options.return_token_ids else UNSET,
        )

    def _chunk(
        self,
        choices: Sequence[ChatChunkChoice],
        usage: Usage | None,
        prompt_token_ids: Sequence[int] | UnsetType = UNSET,
    ) -> ChatCompletion:
        return ChatCompletion(
            self._answers.request_id,
            "chat.completion.chunk",
            self._answers.created_s,
            self._model_name,
            choices,
            UNSET if usage is None else usage,
            prompt_token_ids,
        )

    def _prompt_token_ids(self) -> Sequence[int] | UnsetType:
        return self._answers.prompts[0].token_ids if self._options.return_token_ids else UNSET

    def _logprobs(self, pieces: Sequence[Piece]) -> ChatLogprobs | None:
        num_top = self._options.sampling.num_logprobs
        if num_top is None:
            return None
        return chat_logprobs(list(chain.from_iterable(piece.logprobs for piece in pieces)), num_top, self._spelling)
