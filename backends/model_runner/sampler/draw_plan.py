"""What a step's drawing needs, worked out on the host while the device is busy with the step before."""

from dataclasses import dataclass

import numpy as np

from backends.model_runner.packed_arrays import Array
from backends.model_runner.sampler.noise_keys import noise_keys
from backends.model_runner.sampler.parameter_table import LogitEdits, ParameterTable, Wish

FEW_CANDIDATES_MAX = 512
"""Up to this top_k the candidates are found by selection; beyond it, and for top_p alone, by a full sort."""


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows that are drawn at random, those of one kind of cut-off together.

    The first ``num_uncut`` have neither top_k nor top_p, the next ``num_few`` a small top_k.
    """

    rows: Array  # [num_random] int64: of the logits
    temperature: Array  # [num_random] float32
    log_min_p: Array | None  # [num_random] float32, -inf where there is none; None: nobody has it
    top_k: Array  # [num_random] int64, the vocabulary's size where there is none
    top_p: Array  # [num_random] float32
    keys: Array  # [2, num_random] int32: of the noise
    num_uncut: int
    num_few: int
    few_top_k_max: int


@dataclass(frozen=True, slots=True)
class KernelRows:
    """What a `DrawTokens` kernel is told of every row, in as few arrays as there are types."""

    integers: Array  # [2, num_rows] int64: seeds and positions; with cut-offs [3, num_rows]: top_k, too
    floats: Array  # [1, num_rows] float32: temperatures; with cut-offs [3, num_rows]: top_p and min_p, too

    @property
    def temperature(self) -> Array:
        temperature: Array = self.floats[0]
        return temperature

    @property
    def seeds(self) -> Array:
        seeds: Array = self.integers[0]
        return seeds

    @property
    def positions(self) -> Array:
        positions: Array = self.integers[1]
        return positions

    @property
    def has_cutoffs(self) -> bool:
        return len(self.floats) > 1

    def at(self, positions: Array) -> "KernelRows":
        """The same rows at other positions of their outputs."""
        integers = self.integers.copy()
        integers[1] = positions
        return KernelRows(integers, self.floats)


@dataclass(frozen=True, slots=True)
class PenaltyRows:
    """Rows whose logits depend on which tokens were there before."""

    places: Array  # [4, num_penalised] int64: rows of the logits, of the token table; tokens known; of them prompt
    penalties: Array  # [3, num_penalised] float32: repetition, presence, frequency
    num_tokens_max: int
    has_repetition: bool
    has_others: bool

    def at(self, num_tokens: Array) -> "PenaltyRows":
        """The same rows once so many tokens of all the step's rows are known."""
        places = self.places.copy()
        places[2] = num_tokens[places[0]]
        return PenaltyRows(places, self.penalties, int(places[2].max()), self.has_repetition, self.has_others)


@dataclass(frozen=True, slots=True)
class EditRows:
    """Single logits to change; ``*_cells`` are row * vocab_size + token id."""

    limited_rows: Array  # [num_limited] int64
    allowed_cells: Array  # int64, of [num_limited, vocab_size]
    bias_cells: Array  # int64
    bias_values: Array  # float32
    banned_cells: Array  # int64
    word_cells: Array  # [num_words] int64: last tokens of bad words
    word_prefixes: Array  # [num_words, prefix_len_max] int64, the last token first, -1 beyond the prefix
    word_table_rows: Array  # [num_words] int64: of the token table
    word_num_tokens: Array  # [num_words] int64: prompt and output so far


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Rows whose log-probabilities are reported."""

    rows: Array  # [num_reported] int64: of the logits
    num_logprobs: Array  # [num_reported] int64
    num_logprobs_max: int


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """How the rows of a step's logits are drawn from. What is None, nobody wants."""

    num_rows: int
    random: RandomRows | None = None
    kernel: KernelRows | None = None
    penalties: PenaltyRows | None = None
    edits: EditRows | None = None
    logprobs: LogprobRows | None = None
    refused_rows: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether tokens are drawn from the model's logits as they are."""
        return self.penalties is None and self.edits is None


def plan_drawing(
    table: ParameterTable, table_rows: Array, num_tokens: Array, vocab_size: int, *, by_kernel: bool = False
) -> DrawPlan:
    """For the logits of these requests, of which so many tokens are known: both [num_sampled] int64.

    ``by_kernel``: a `DrawTokens` draws, else torch's operators.
    """
    num_rows = table_rows.size
    wishes = table.wishes[table_rows]
    everything = int(np.bitwise_or.reduce(wishes)) if num_rows else 0
    kernel = _kernel_rows(table, table_rows, num_tokens, everything) if by_kernel and num_rows else None
    if not everything:
        return DrawPlan(num_rows, kernel=kernel)
    is_random = everything & Wish.RANDOM and not by_kernel
    return DrawPlan(
        num_rows,
        random=_random_rows(table, table_rows, num_tokens, wishes, vocab_size) if is_random else None,
        kernel=kernel,
        penalties=_penalty_rows(table, table_rows, num_tokens, wishes) if everything & Wish.PENALTIES else None,
        edits=_edit_rows(table, table_rows, num_tokens, wishes, vocab_size) if everything & Wish.EDITS else None,
        logprobs=_logprob_rows(table, table_rows, wishes) if everything & Wish.LOGPROBS else None,
        refused_rows=tuple(np.flatnonzero(wishes & Wish.REFUSED).tolist()) if everything & Wish.REFUSED else (),
    )


def _random_rows(
    table: ParameterTable, table_rows: Array, num_tokens: Array, wishes: Array, vocab_size: int
) -> RandomRows:
    is_cut = (wishes & (Wish.TOP_K | Wish.TOP_P)) != 0
    top_k = table.top_k[table_rows]
    is_sorted = is_cut & ((top_k == 0) | (top_k > FEW_CANDIDATES_MAX))
    rows = np.flatnonzero(wishes & Wish.RANDOM)
    kind = is_cut.astype(np.int64) + is_sorted
    rows = rows[np.argsort(kind[rows], kind="stable")]
    counts = np.bincount(kind[rows], minlength=3)
    chosen = table_rows[rows]
    top_k = np.where(top_k[rows] == 0, vocab_size, top_k[rows])
    few = top_k[counts[0] : counts[0] + counts[1]]
    log_min_p = None
    if (wishes & Wish.MIN_P).any():
        with np.errstate(divide="ignore"):
            log_min_p = np.log(table.min_p[chosen])
    return RandomRows(
        rows=rows,
        temperature=table.temperature[chosen],
        log_min_p=log_min_p,
        top_k=top_k,
        top_p=table.top_p[chosen],
        keys=noise_keys(table.seed[chosen], num_tokens[rows] - table.num_prompt_tokens[chosen]),
        num_uncut=int(counts[0]),
        num_few=int(counts[1]),
        few_top_k_max=int(few.max()) if few.size else 0,
    )


def _kernel_rows(table: ParameterTable, table_rows: Array, num_tokens: Array, everything: int) -> KernelRows:
    has_cutoffs = bool(everything & (Wish.TOP_K | Wish.TOP_P | Wish.MIN_P))
    integers = np.empty((3 if has_cutoffs else 2, table_rows.size), np.int64)
    floats = np.empty((3 if has_cutoffs else 1, table_rows.size), np.float32)
    integers[0] = table.seed[table_rows].view(np.int64)
    integers[1] = num_tokens - table.num_prompt_tokens[table_rows]
    floats[0] = table.temperature[table_rows]
    if has_cutoffs:
        integers[2], floats[1], floats[2] = table.top_k[table_rows], table.top_p[table_rows], table.min_p[table_rows]
    return KernelRows(integers, floats)


def _penalty_rows(table: ParameterTable, table_rows: Array, num_tokens: Array, wishes: Array) -> PenaltyRows:
    rows = np.flatnonzero(wishes & Wish.PENALTIES)
    chosen = table_rows[rows]
    penalties = np.ascontiguousarray(table.penalties[chosen].T)
    return PenaltyRows(
        places=np.stack((rows, chosen, num_tokens[rows], table.num_prompt_tokens[chosen])),
        penalties=penalties,
        num_tokens_max=int(num_tokens[rows].max()),
        has_repetition=bool((penalties[0] != 1).any()),
        has_others=bool(penalties[1:].any()),
    )


def _logprob_rows(table: ParameterTable, table_rows: Array, wishes: Array) -> LogprobRows:
    rows = np.flatnonzero(wishes & Wish.LOGPROBS)
    num_logprobs = table.num_logprobs[table_rows[rows]]
    return LogprobRows(rows, num_logprobs, int(num_logprobs.max()))


@dataclass(frozen=True, slots=True)
class _BadWord:
    cell: int
    prefix: tuple[int, ...]
    table_row: int
    num_tokens: int


def _edit_rows(table: ParameterTable, table_rows: Array, num_tokens: Array, wishes: Array, vocab_size: int) -> EditRows:
    limited: list[int] = []
    allowed: list[Array] = []
    bias: list[Array] = []
    bias_values: list[Array] = []
    banned: list[Array] = []
    words: list[_BadWord] = []
    for row in np.flatnonzero(wishes & Wish.EDITS).tolist():
        table_row = int(table_rows[row])
        edits = table.edits[table_row]
        assert edits is not None
        num_known = int(num_tokens[row])
        num_output = num_known - int(table.num_prompt_tokens[table_row])
        if edits.is_limited:
            allowed.append(edits.allowed_token_ids + len(limited) * vocab_size)
            limited.append(row)
        bias.append(edits.bias_token_ids + row * vocab_size)
        bias_values.append(edits.bias_values)
        if num_output < edits.min_tokens:
            banned.append(edits.stop_token_ids + row * vocab_size)
        words.extend(_due_words(edits, row, table_row, num_known, num_output, vocab_size))
    prefix_len_max = max((len(word.prefix) for word in words), default=0)
    prefixes = [word.prefix[::-1] + (-1,) * (prefix_len_max - len(word.prefix)) for word in words]
    return EditRows(
        limited_rows=np.array(limited, np.int64),
        allowed_cells=_joined(allowed, np.int64),
        bias_cells=_joined(bias, np.int64),
        bias_values=_joined(bias_values, np.float32),
        banned_cells=_joined(banned, np.int64),
        word_cells=np.array([word.cell for word in words], np.int64),
        word_prefixes=np.array(prefixes, np.int64).reshape(len(words), prefix_len_max),
        word_table_rows=np.array([word.table_row for word in words], np.int64),
        word_num_tokens=np.array([word.num_tokens for word in words], np.int64),
    )


def _due_words(
    edits: LogitEdits, row: int, table_row: int, num_tokens: int, num_output: int, vocab_size: int
) -> list[_BadWord]:
    """Bad words that the output is long enough to end with; only the device knows whether it does."""
    return [
        _BadWord(row * vocab_size + word[-1], word[:-1], table_row, num_tokens)
        for word in edits.bad_words
        if len(word) - 1 <= num_output
    ]


def _joined(parts: list[Array], dtype: type[np.int64] | type[np.float32]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
