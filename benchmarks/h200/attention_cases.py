"""What attention is measured on: batches of real models' shapes, their operands, and float32 rows to check against."""

import itertools
import random
from dataclasses import dataclass

import torch

from backends.conformance.batches import HeadShape, inputs_on, step_inputs
from backends.step_inputs import StepInputs
from traces.generators.generate import generate

BLOCK_SIZE = 16
NUM_CHECKED_ROWS = 12
QWEN2_5_7B = HeadShape(num_heads=28, num_kv_heads=4, head_dim=128)
QWEN3_0_6B = HeadShape(num_heads=16, num_kv_heads=8, head_dim=128)


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A step's attention of one layer; ``sequences`` are (rows, context length), those of one row first."""

    model: str
    group: str
    name: str
    heads: HeadShape
    sequences: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(rows for rows, _ in self.sequences)

    @property
    def num_bytes(self) -> int:
        """K and V of every context, Q and the result, each moved once."""
        context = sum(context_len for _, context_len in self.sequences)
        return 4 * self.heads.head_dim * (self.heads.num_kv_heads * context + self.heads.num_heads * self.num_tokens)

    @property
    def num_flops(self) -> int:
        """Two products per pair of a row and a key that it sees."""
        pairs = sum(rows * context_len - rows * (rows - 1) // 2 for rows, context_len in self.sequences)
        return 4 * self.heads.head_dim * self.heads.num_heads * pairs

    @property
    def has_only_prompts(self) -> bool:
        """No key is older than this step, so that K and V need not come from the cache."""
        return all(rows == context_len for rows, context_len in self.sequences)

    @property
    def has_only_decodes(self) -> bool:
        return all(rows == 1 for rows, _ in self.sequences)


def conversation_contexts(num_decodes: int) -> list[int]:
    """Context lengths of so many decodes at some moment of a conversation trace, long ones and short ones mixed.

    A request is there the more often the longer its output is, and anywhere on its way.
    """
    trace = generate("azure-conv", num_requests=10 * num_decodes, seed=0)
    rng = random.Random(0)
    running = rng.choices(trace.requests, [request.num_output_tokens for request in trace.requests], k=num_decodes)
    return [request.num_prompt_tokens + rng.randint(1, request.num_output_tokens) for request in running]


def cases() -> list[AttentionCase]:
    """The most useful first, for a run that may not reach the end."""

    def large(group: str, name: str, *sequences: tuple[int, int]) -> AttentionCase:
        return AttentionCase("Qwen2.5-7B", group, name, QWEN2_5_7B, sequences)

    def small(group: str, name: str, *sequences: tuple[int, int]) -> AttentionCase:
        return AttentionCase("Qwen3-0.6B", group, name, QWEN3_0_6B, sequences)

    return [
        large("prefill", "prompt of 1024", (1024, 1024)),
        large("decode", "256 x 1024", *((1, 1024),) * 256),
        large("prefill", "14 prompts of 560", *((560, 560),) * 14),
        large("mixed", "200 decodes x 600, 4 prompts of 1000", *((1, 600),) * 200, *((1000, 1000),) * 4),
        large("prefill", "prompt of 8192", (8192, 8192)),
        large("decode", "32 x 1024", *((1, 1024),) * 32),
        large("decode", "1 x 32768", (1, 32768)),
        large("mixed", "64 decodes x 1024, prompt of 1024", *((1, 1024),) * 64, (1024, 1024)),
        large("chunk", "512 of 4096", (512, 4096)),
        large("prefill", "8 prompts of 1024", *((1024, 1024),) * 8),
        large("decode", "128 x 1024", *((1, 1024),) * 128),
        large("decode", "1 x 1024", (1, 1024)),
        large("prefill", "prompt of 512", (512, 512)),
        large("prefill", "prompt of 2048", (2048, 2048)),
        large("decode", "32 x 8192", *((1, 8192),) * 32),
        large("chunk", "2048 of 32768", (2048, 32768)),
        large("decode", "256 of conversations", *((1, context) for context in conversation_contexts(256))),
        large("decode", "128 of conversations", *((1, context) for context in conversation_contexts(128))),
        large("decode", "48 of conversations", *((1, context) for context in conversation_contexts(48))),
        small("prefill", "14 prompts of 560", *((560, 560),) * 14),
        small("decode", "256 x 1024", *((1, 1024),) * 256),
        large("decode", "16 x 16384", *((1, 16384),) * 16),
        large("prefill", "prompt of 128", (128, 128)),
        small("mixed", "200 decodes x 600, 4 prompts of 1000", *((1, 600),) * 200, *((1000, 1000),) * 4),
        small("prefill", "prompt of 8192", (8192, 8192)),
    ]


@dataclass(frozen=True, slots=True)
class Buffers:
    """One set of operands: the cache, and the step's joined projection, whose rows Q, K and V are parts of.

    Where a case has only prompts, the projection's K and V are what the cache holds too.
    """

    query: torch.Tensor  # [num_tokens, num_heads, head_dim], strided
    keys: torch.Tensor  # [num_tokens, num_kv_heads, head_dim], strided
    values: torch.Tensor
    key_cache: torch.Tensor  # [num_blocks, BLOCK_SIZE, num_kv_heads, head_dim]
    value_cache: torch.Tensor


@dataclass(frozen=True, slots=True)
class Gather:
    """Which rows of the cache, seen as [num_rows, row_tokens * num_kv_heads * head_dim], make K and V contiguous.

    Whole blocks where every context fills its last one, else single tokens.
    """

    index: torch.Tensor
    row_tokens: int

    def of(self, cache: torch.Tensor) -> torch.Tensor:
        """[sum of the context lengths, num_kv_heads, head_dim]."""
        rows = cache.view(-1, self.row_tokens * cache.shape[2] * cache.shape[3]).index_select(0, self.index)
        return rows.view(-1, cache.shape[2], cache.shape[3])


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    case: AttentionCase
    inputs: StepInputs
    gather: Gather
    key_starts: torch.Tensor  # [num_seqs + 1] int32: where each sequence's gathered keys begin
    buffers: tuple[Buffers, ...]
    scale: float


def attention_batch(case: AttentionCase, num_buffers: int, device: torch.device) -> AttentionBatch:
    """Operands of a case in bfloat16, its blocks dealt out at random, the same ones in every set of buffers."""
    generator = torch.Generator().manual_seed(0)
    num_blocks = [-(-context_len // BLOCK_SIZE) for _, context_len in case.sequences]
    order = torch.randperm(sum(num_blocks), generator=generator).to(torch.int32)
    tables = torch.zeros(len(num_blocks), max(num_blocks), dtype=torch.int32)
    ends = list(itertools.accumulate(num_blocks))
    for table, count, end in zip(tables, num_blocks, ends, strict=True):
        table[:count] = order[end - count : end]
    gather = gather_of(case, order, ends, device)
    lengths = [context_len for _, context_len in case.sequences]
    return AttentionBatch(
        case,
        inputs_on(step_inputs(case.sequences, tables), device),
        gather,
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device),
        tuple(draw_buffers(case, gather, len(order), device) for _ in range(num_buffers)),
        case.heads.head_dim**-0.5,
    )


def gather_of(case: AttentionCase, order: torch.Tensor, ends: list[int], device: torch.device) -> Gather:
    if all(context_len % BLOCK_SIZE == 0 for _, context_len in case.sequences):
        return Gather(order.to(device), BLOCK_SIZE)
    slots = (order.long().unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    starts = [0, *ends[:-1]]
    kept = [
        slots[start * BLOCK_SIZE :][:context_len]
        for start, (_, context_len) in zip(starts, case.sequences, strict=True)
    ]
    return Gather(torch.cat(kept).to(device), 1)


def draw_buffers(case: AttentionCase, gather: Gather, num_blocks: int, device: torch.device) -> Buffers:
    heads = case.heads
    parts = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
    joined = torch.randn(case.num_tokens, sum(parts) * heads.head_dim, dtype=torch.bfloat16, device=device)
    query, keys, values = joined.unflatten(1, (-1, heads.head_dim)).split(parts, dim=1)
    shape = (num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
    caches = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2)]
    if case.has_only_prompts:
        for part, cache in zip((keys, values), caches, strict=True):
            part.copy_(gather.of(cache))
    return Buffers(query, keys, values, *caches)


def relative_error(output: torch.Tensor, batch: AttentionBatch, buffers: Buffers) -> float:
    """The worst relative Frobenius error of some rows of ``output`` [num_tokens, num_heads, head_dim].

    Infinite if any value of any row is not finite.
    """
    if not bool(torch.isfinite(output).all()):
        return float("inf")
    errors = []
    for sequence, row in checked_rows(batch.case):
        expected = reference_row(batch, buffers, sequence, row)
        found = output[int(batch.inputs.query_starts[sequence]) + row].float()
        errors.append(float((found - expected).norm() / expected.norm()))
    return max(errors)


def checked_rows(case: AttentionCase) -> list[tuple[int, int]]:
    """(Sequence, row of it): the last row of the last one, the first of the first, and some drawn at random."""
    generator = torch.Generator().manual_seed(1)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    chosen = [(0, 0), (len(case.sequences) - 1, case.sequences[-1][0] - 1)]
    while len(chosen) < NUM_CHECKED_ROWS:
        sequence = below(len(case.sequences))
        chosen.append((sequence, below(case.sequences[sequence][0])))
    return chosen


def reference_row(batch: AttentionBatch, buffers: Buffers, sequence: int, row: int) -> torch.Tensor:
    """Float32 attention of one row: [num_heads, head_dim]."""
    heads, (rows, context_len) = batch.case.heads, batch.case.sequences[sequence]
    num_visible = context_len - rows + row + 1
    blocks = batch.inputs.block_tables[sequence, : -(-num_visible // BLOCK_SIZE)].long()
    keys, values = (
        cache[blocks].flatten(0, 1)[:num_visible].float() for cache in (buffers.key_cache, buffers.value_cache)
    )
    query = buffers.query[int(batch.inputs.query_starts[sequence]) + row].float()
    grouped = query.view(heads.num_kv_heads, -1, heads.head_dim)
    weights = torch.einsum("kgd,pkd->kgp", grouped, keys).mul(batch.scale).softmax(-1)
    return torch.einsum("kgp,pkd->kgd", weights, values).flatten(0, 1)
