"""The compiled price of a step: a handful of integers that any cost model boils down to.

A cost model is compiled once, for one model on one kind of instance. Pricing a step is then a look-up
and a few integer operations, since a long run asks hundreds of thousands of times.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import pairwise

from sagellm.cost_model.step_cost import StepCost, StepFeatures


@dataclass(frozen=True, slots=True)
class StepPriceTable:
    """Prices in femtoseconds. A knot is a point between which prices are interpolated linearly.

    Sizes in ``graph_sizes`` are those for which the engine has captured device graphs: a step is padded to
    the next one, and beyond the largest it is not padded. Decode-only steps cost ``decode_base_fs`` at
    their padded number of sequences plus ``decode_context_fs`` for each KV token read. Any other step
    costs ``mixed_base_fs`` at its padded number of tokens, plus terms for what its attention reads, and
    never less than ``mixed_floor_fs``, the time that its launch takes.

    A device that multiplies without a break slows down, as its power is limited: a step with chunks costs
    ``sustained_extra_permille`` more once such steps have kept it busy for ``sustained_ns``, and in proportion
    less before.
    """

    graph_sizes: tuple[int, ...]
    decode_num_seqs: tuple[int, ...]  # knots
    decode_base_fs: tuple[int, ...]
    decode_context_fs: tuple[int, ...]
    mixed_num_tokens: tuple[int, ...]  # knots
    mixed_base_fs: tuple[int, ...]
    mixed_floor_fs: int
    mixed_seq_fs: int  # for each sequence of a mixed step
    mixed_context_fs: int  # for each KV token that decodes read beside chunks
    token_pair_fs: int  # for each pair of a chunk's query token and a key that it attends to
    chunk_context_fs: int  # at least this for each earlier KV token of a chunk's request
    host_base_fs: int
    host_seq_fs: int
    sustained_extra_permille: int = 0
    sustained_ns: int = 1

    def __post_init__(self) -> None:
        for knots in (self.decode_num_seqs, self.mixed_num_tokens):
            if len(knots) < 2 or any(low >= high for low, high in pairwise(knots)):
                raise ValueError(f"knots of a price table must be two or more and rise: {knots}")
        if not len(self.decode_num_seqs) == len(self.decode_base_fs) == len(self.decode_context_fs):
            raise ValueError("decode_num_seqs, decode_base_fs and decode_context_fs must be equally long")
        if len(self.mixed_num_tokens) != len(self.mixed_base_fs):
            raise ValueError("mixed_num_tokens and mixed_base_fs must be equally long")
        if self.sustained_ns < 1:
            raise ValueError(f"sustained_ns must be 1 or more: {self.sustained_ns}")


@dataclass(frozen=True, slots=True)
class TabulatedStepCost:
    """Prices steps from a ``StepPriceTable``; a ``StepCostModel``."""

    table: StepPriceTable
    status: str
    request_overhead_ns: int
    # What has been worked out before, by number of sequences or tokens. It changes no answer.
    _decode_by_num_seqs: dict[int, tuple[int, int, int, int]] = field(default_factory=dict, repr=False, compare=False)
    _mixed_by_num_tokens: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def step_cost(self, features: StepFeatures) -> StepCost:
        """The price of one step and of its repetitions. Mixed steps are never repeated."""
        if features.chunks:
            return self._mixed_cost(features)
        num_decode_seqs = features.num_decode_seqs
        prices = self._decode_by_num_seqs.get(num_decode_seqs)
        if prices is None:
            prices = self._decode_by_num_seqs[num_decode_seqs] = decode_prices(self.table, num_decode_seqs)
        base_fs, context_fs, growth_fs, host_fs = prices
        return StepCost(base_fs + context_fs * features.num_decode_context_tokens, growth_fs, host_fs)

    def _mixed_cost(self, features: StepFeatures) -> StepCost:
        table, chunks = self.table, features.chunks
        num_tokens = num_decode_seqs = features.num_decode_seqs
        attention_fs = table.mixed_context_fs * features.num_decode_context_tokens
        for num_chunk_tokens, num_computed_tokens in chunks:
            num_tokens += num_chunk_tokens
            attention_fs += chunk_attention_fs(table, num_chunk_tokens, num_computed_tokens)
        base_fs = self._mixed_by_num_tokens.get(num_tokens)
        if base_fs is None:
            padded = padded_size(table.graph_sizes, num_tokens)
            base_fs = interpolated(table.mixed_num_tokens, table.mixed_base_fs, padded)
            self._mixed_by_num_tokens[num_tokens] = base_fs
        num_seqs = num_decode_seqs + len(chunks)
        device_fs = max(table.mixed_floor_fs, base_fs + attention_fs + table.mixed_seq_fs * num_seqs)
        if table.sustained_extra_permille:
            device_fs += device_fs * sustained_permille(table, features.prefilling_ns) // 1000
        host_fs = table.host_base_fs + table.host_seq_fs * num_seqs
        return StepCost(device_fs, 0, host_fs, linear_repeat_max=1)


def decode_prices(table: StepPriceTable, num_seqs: int) -> tuple[int, int, int, int]:
    """Base, price of a context token, growth of a repetition, and host's share, of a decode-only step."""
    padded = padded_size(table.graph_sizes, num_seqs)
    base_fs = interpolated(table.decode_num_seqs, table.decode_base_fs, padded)
    context_fs = interpolated(table.decode_num_seqs, table.decode_context_fs, padded)
    return base_fs, context_fs, num_seqs * context_fs, table.host_base_fs + table.host_seq_fs * num_seqs


def chunk_attention_fs(table: StepPriceTable, num_tokens: int, num_computed_tokens: int) -> int:
    """Attention of a chunk over its request's earlier tokens and, causally, over itself.

    Either the arithmetic of its query-key pairs or the reading of earlier keys and values takes the time.
    """
    double_pairs = num_tokens * (2 * num_computed_tokens + num_tokens)
    return max(table.token_pair_fs * double_pairs // 2, table.chunk_context_fs * num_computed_tokens)


def sustained_permille(table: StepPriceTable, prefilling_ns: int) -> int:
    """How much more a step with chunks costs after so long a time of others."""
    return table.sustained_extra_permille * min(prefilling_ns, table.sustained_ns) // table.sustained_ns


def padded_size(graph_sizes: tuple[int, ...], size: int) -> int:
    """The captured size that a step of ``size`` runs at; beyond the largest, ``size`` itself."""
    index = bisect_left(graph_sizes, size)
    return graph_sizes[index] if index < len(graph_sizes) else size


def interpolated(knots: tuple[int, ...], values: tuple[int, ...], point: int) -> int:
    """Linear between knots, with the outermost slopes beyond them but never below zero."""
    index = min(max(bisect_right(knots, point) - 1, 0), len(knots) - 2)
    low, high = knots[index], knots[index + 1]
    rise = (values[index + 1] - values[index]) * (point - low) // (high - low)
    return max(0, values[index] + rise)
