"""One request as its client saw it. Times are nanoseconds from the start of the run."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from sagellm.core.request import FinishReason
from sagellm.load_client.completion_chunk import CompletionChunk, Usage

FINISH_REASONS = {"length": FinishReason.LENGTH, "abort": FinishReason.ABORT, "error": FinishReason.ERROR}
"""What a server calls the end; anything else that it says means that the model stopped of itself."""


@dataclass(slots=True)
class Answer:
    """What has come back so far.

    TTFT ends with the first chunk that brings a token: that has text, lists token ids, or raises the count of
    tokens that the server sends along. One without any of these, such as one that only names a role, does
    not count. Gaps lie between chunks that bring tokens, a chunk of several counting once.
    """

    sent_ns: int
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    gaps_ns: array[int] = field(default_factory=lambda: array("q"))
    num_chunks: int = 0  # that brought tokens
    num_tokens_listed: int = 0  # in chunks that list their tokens
    num_tokens_used: int | None = None  # as the server counts them
    num_cached_tokens: int | None = None  # of the prompt; None: the server did not say
    finish_reason: FinishReason | None = None
    reject_reason: str | None = None  # it was refused: 400, 429 or 503
    failure: str | None = None  # why it ended with an error
    end_ns: int = 0

    def take(self, chunk: CompletionChunk, now_ns: int) -> None:
        """A chunk arrived."""
        num_tokens_before = self.num_tokens_used or 0
        if chunk.usage is not None:
            self._take_usage(chunk.usage)
        is_counted = (self.num_tokens_used or 0) > num_tokens_before
        for choice in chunk.choices or ():
            if choice.has_output or is_counted:
                self._take_output(now_ns)
                self.num_tokens_listed += len(choice.token_ids or ())
            if choice.finish_reason is not None:
                # The last token may have no text of its own: it then comes with the reason alone.
                self.last_token_ns = now_ns
                self.finish_reason = FINISH_REASONS.get(choice.finish_reason, FinishReason.STOP)

    def _take_usage(self, usage: Usage) -> None:
        if usage.completion_tokens is not None:
            self.num_tokens_used = usage.completion_tokens
        if usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens is not None:
            self.num_cached_tokens = usage.prompt_tokens_details.cached_tokens

    def _take_output(self, now_ns: int) -> None:
        if self.first_token_ns is None:
            self.first_token_ns = now_ns
        elif self.last_token_ns is not None:
            self.gaps_ns.append(now_ns - self.last_token_ns)
        self.last_token_ns = now_ns
        self.num_chunks += 1

    @property
    def num_output_tokens(self) -> int:
        """As the server counts; where it does not, as the chunks list them, or one for each chunk."""
        if self.num_tokens_used is not None:
            return self.num_tokens_used
        return max(self.num_tokens_listed, self.num_chunks)

    @property
    def is_complete(self) -> bool:
        return self.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)

    def finish(self, now_ns: int, max_output_tokens: int, is_done: bool) -> None:
        """The stream is over. ``is_done``: the server said that this is all."""
        self.end_ns = now_ns
        if self.reject_reason is not None:
            return
        if self.failure is not None:
            self.finish_reason = FinishReason.ERROR
        elif self.finish_reason is None and is_done and self.num_output_tokens:
            is_full = self.num_output_tokens >= max_output_tokens
            self.finish_reason = FinishReason.LENGTH if is_full else FinishReason.STOP
        elif self.finish_reason is None:
            self.failure = "the stream ended before the answer was complete"
            self.finish_reason = FinishReason.ERROR
        elif not self.is_complete:
            self.failure = f"the server ended it with {self.finish_reason}"
        if self.is_complete and self.first_token_ns is None:
            # None of the tokens had text: what is known of the first is that it was there at the end.
            self.first_token_ns = self.last_token_ns
