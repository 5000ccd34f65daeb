"""The sampling parameters of all known requests, as arrays with a row for each."""

from dataclasses import dataclass
from enum import IntFlag

import numpy as np

from backends.model_runner.packed_arrays import Array
from sagellm.core.request import RequestSpec
from sagellm.core.sampling import GREEDY, SamplingParameters

GREEDY_TEMPERATURE_MAX = 1e-5
"""Below it the most likely token is taken, as vLLM does: its logits would overflow when divided."""


class Wish(IntFlag):
    """What a request wants besides its most likely token."""

    RANDOM = 1
    TOP_K = 2
    TOP_P = 4
    MIN_P = 8
    PENALTIES = 16
    EDITS = 32  # of single logits: bias, allowed tokens, bad words, stop tokens held back
    LOGPROBS = 64
    REFUSED = 128  # a token id that the model does not have: the request is to end with an error


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes of one request's single logits. Token ids that the model does not have are left out."""

    bias_token_ids: Array  # int64
    bias_values: Array  # float32
    is_limited: bool  # to allowed_token_ids
    allowed_token_ids: Array  # int64
    stop_token_ids: Array  # int64; held back until there are min_tokens
    min_tokens: int
    bad_words: tuple[tuple[int, ...], ...]


class ParameterTable:
    """Rows as in `RequestTable`."""

    def __init__(self, vocab_size: int, num_rows: int) -> None:
        self._vocab_size = vocab_size
        self.wishes = np.zeros(num_rows, np.int64)
        self.temperature = np.zeros(num_rows, np.float32)  # 0: greedy
        self.top_k = np.zeros(num_rows, np.int64)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.penalties = np.zeros((num_rows, 3), np.float32)  # repetition, presence, frequency
        self.seed = np.zeros(num_rows, np.uint64)
        self.num_prompt_tokens = np.zeros(num_rows, np.int64)
        self.num_logprobs = np.zeros(num_rows, np.int64)
        self.edits: list[LogitEdits | None] = [None] * num_rows
        self.num_changes = 0

    def grow(self, num_rows: int) -> None:
        """Make room for so many rows."""
        num_new = num_rows - len(self.edits)
        for name in ("wishes", "temperature", "top_k", "top_p", "min_p", "seed", "num_prompt_tokens", "num_logprobs"):
            setattr(self, name, np.pad(getattr(self, name), (0, num_new)))
        self.penalties = np.pad(self.penalties, ((0, num_new), (0, 0)))
        self.edits.extend([None] * num_new)

    def fill(self, row: int, spec: RequestSpec) -> None:
        """Give the row to a request."""
        sampling = spec.sampling or GREEDY
        self.num_changes += 1
        self.temperature[row] = sampling.temperature if sampling.temperature >= GREEDY_TEMPERATURE_MAX else 0.0
        self.top_k[row] = sampling.top_k if 0 < sampling.top_k < self._vocab_size else 0
        self.top_p[row] = sampling.top_p if sampling.top_p < 1 else 2.0  # beyond what rounding can reach
        self.min_p[row] = sampling.min_p
        self.penalties[row] = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        self.seed[row] = sampling.seed & 0xFFFF_FFFF_FFFF_FFFF
        self.num_prompt_tokens[row] = spec.num_prompt_tokens
        self.num_logprobs[row] = sampling.num_logprobs or 0
        self.edits[row] = self._edits(spec, sampling)
        self.wishes[row] = self._wishes(row, sampling)

    def refuse(self, row: int) -> None:
        """Whatever is drawn for the row means nothing."""
        self.num_changes += 1
        self.wishes[row] |= Wish.REFUSED

    def _wishes(self, row: int, sampling: SamplingParameters) -> Wish:
        wishes = Wish(0)
        if sampling.temperature >= GREEDY_TEMPERATURE_MAX:
            wishes |= Wish.RANDOM
            wishes |= Wish.TOP_K if self.top_k[row] else Wish(0)
            wishes |= Wish.TOP_P if sampling.top_p < 1 else Wish(0)
            wishes |= Wish.MIN_P if sampling.min_p > 0 else Wish(0)
        if tuple(self.penalties[row]) != (1, 0, 0):
            wishes |= Wish.PENALTIES
        if self.edits[row] is not None:
            wishes |= Wish.EDITS
        if sampling.num_logprobs is not None:
            wishes |= Wish.LOGPROBS
        return wishes

    def _edits(self, spec: RequestSpec, sampling: SamplingParameters) -> LogitEdits | None:
        holds_back_stops = bool(sampling.min_tokens and spec.stop_token_ids)
        if not (sampling.logit_bias or sampling.allowed_token_ids or sampling.bad_words or holds_back_stops):
            return None
        bias = [(token_id, value) for token_id, value in sampling.logit_bias if self._has(token_id)]
        return LogitEdits(
            bias_token_ids=np.array([token_id for token_id, _ in bias], np.int64),
            bias_values=np.array([value for _, value in bias], np.float32),
            is_limited=bool(sampling.allowed_token_ids),
            allowed_token_ids=self._own(sampling.allowed_token_ids),
            stop_token_ids=self._own(spec.stop_token_ids),
            min_tokens=sampling.min_tokens,
            bad_words=tuple(word for word in sampling.bad_words if word and all(map(self._has, word))),
        )

    def _has(self, token_id: int) -> bool:
        return 0 <= token_id < self._vocab_size

    def _own(self, token_ids: tuple[int, ...]) -> Array:
        return np.array([token_id for token_id in token_ids if self._has(token_id)], np.int64)
