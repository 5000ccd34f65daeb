"""One prompt's one answer: tokens from the engine to text, ended as the client asked."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.step_executor import TokenLogprobs
from sagellm.server.engine import Engine, OutputDelta, Refusal, RequestOutcome
from sagellm.server.openai.errors import ApiError
from sagellm.server.openai.options import GenerationOptions
from sagellm.server.openai.stop_strings import StopMatch, StopStrings
from sagellm.server.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Finish:
    """How an answer ended, in the API's words. ``stop_reason`` is the stop string or the client's stop token."""

    reason: str
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer. The last piece, and no other, has a finish."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish | None


class Generation:
    """Serves one request of the core. Whoever makes it must `close` it."""

    __slots__ = (
        "_engine",
        "_is_closed",
        "_is_over",
        "_options",
        "_retry_after_s",
        "_spec",
        "_stop_strings",
        "_text",
        "num_cached_tokens",
        "num_output_tokens",
    )

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        spec: RequestSpec,
        options: GenerationOptions,
        retry_after_s: int,
    ) -> None:
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._engine = engine
        self._spec = spec
        self._options = options
        self._retry_after_s = retry_after_s
        self._text = tokenizer.text_stream(options.skip_special_tokens)
        stops = options.stop_strings
        self._stop_strings = StopStrings(stops, options.include_stop_in_output) if stops else None
        self._is_over = False  # the engine has said so
        self._is_closed = False

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes. Raises ApiError where the engine gives none, or fails on the way."""
        finish: Finish | None = None
        async for item in self._engine.submit(self._spec):
            if isinstance(item, OutputDelta):
                if finish is None:
                    piece = self._piece(item)
                    finish = piece.finish
                    yield piece
                    if finish is not None and finish.reason == "stop" and not self._ends_itself(piece):
                        self._engine.cancel(self._spec.request_id, FinishReason.STOP)
                        break
            else:
                self._is_over = True
                if finish is None:
                    yield self._last_piece(item)
                return
        self._is_over = True

    def close(self) -> None:
        """Nobody reads on: where the engine is still at it, it stops now."""
        if not self._is_over and not self._is_closed:
            self._engine.cancel(self._spec.request_id)
        self._is_closed = True

    def _ends_itself(self, piece: Piece) -> bool:
        """Whether the engine ends here too: it knows stop tokens and limits, but not texts."""
        return bool(piece.token_ids) and piece.token_ids[-1] in self._spec.stop_token_ids

    def _piece(self, delta: OutputDelta) -> Piece:
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        token_ids, stops = delta.token_ids, self._spec.stop_token_ids
        text, finish = "", None
        if self._stop_strings is None:
            ends = bool(token_ids) and token_ids[-1] in stops
            text = self._text.push(self._shown(token_ids[:-1], token_ids[-1]) if ends else token_ids)
        else:
            text, num_taken, match = self._pushed_one_by_one(token_ids)
            token_ids = token_ids[:num_taken]
            ends = match is None and bool(token_ids) and token_ids[-1] in stops
            if match is not None:
                finish = Finish("stop", match.stop)
        self.num_output_tokens += len(token_ids)
        if finish is None:
            if ends:
                finish = self._stopped_by(token_ids[-1])
            elif self.num_output_tokens >= self._spec.max_output_tokens:
                finish = Finish("length")
            if finish is not None:
                text += self._flushed()
        return Piece(text, token_ids, delta.logprobs[: len(token_ids)], finish)

    def _pushed_one_by_one(self, token_ids: tuple[int, ...]) -> tuple[str, int, StopMatch | None]:
        """The text that may go out, the tokens that it took, and the stop string where one is complete."""
        assert self._stop_strings is not None
        texts: list[str] = []
        for index, token_id in enumerate(token_ids):
            is_end = token_id in self._spec.stop_token_ids
            text = self._text.push(self._shown((), token_id) if is_end else (token_id,))
            if self.num_output_tokens + index + 1 <= self._options.sampling.min_tokens:
                texts.append(text)
                continue
            text, match = self._stop_strings.push(text)
            texts.append(text)
            if match is not None or is_end:
                return "".join(texts), index + 1, match
        return "".join(texts), len(token_ids), None

    def _shown(self, token_ids: tuple[int, ...], stop_token_id: int) -> Sequence[int]:
        """The tokens to make text of: a stop token is shown only where the client wants it so."""
        return (*token_ids, stop_token_id) if self._options.include_stop_in_output else token_ids

    def _stopped_by(self, token_id: int) -> Finish:
        return Finish("stop", None if token_id in self._options.eos_token_ids else token_id)

    def _flushed(self) -> str:
        """What was held back: an incomplete character, and what might have become a stop string."""
        text = self._text.flush()
        if self._stop_strings is None:
            return text
        shown, match = self._stop_strings.push(text)
        return shown if match is not None else shown + self._stop_strings.flush()

    def _last_piece(self, outcome: RequestOutcome) -> Piece:
        """The end that the engine tells of before the tokens did."""
        match outcome.reason:
            case FinishReason.STOP | FinishReason.LENGTH:
                return Piece(self._flushed(), (), (), Finish(outcome.reason.value))
            case FinishReason.ABORT if not self._engine.is_draining:
                return Piece(self._flushed(), (), (), Finish("abort"))
            case FinishReason.ABORT:
                raise ApiError(503, "the server is shutting down", retry_after_s=self._retry_after_s)
            case FinishReason.ERROR:
                raise ApiError(500, f"the model failed on this request{_because(outcome.message)}")
            case None:
                raise self._rejection(outcome)

    def _rejection(self, outcome: RequestOutcome) -> ApiError:
        message = f"the request is not served{_because(outcome.message)}"
        match outcome.refusal:
            case Refusal.QUEUE_FULL:
                return ApiError(429, message, retry_after_s=self._retry_after_s)
            case Refusal.UNAVAILABLE:
                return ApiError(503, message, retry_after_s=self._retry_after_s)
            case Refusal.IMPOSSIBLE | None:
                return ApiError(400, message)


def _because(message: str) -> str:
    return f": {message}" if message else ""
