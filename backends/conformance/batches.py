"""Paged batches for checks of attention and KV writes: blocks in any order, and foreign memory that poisons."""

import itertools
import math
from dataclasses import dataclass

import torch

from backends.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class HeadShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Queries and caches of one batch, on the CPU."""

    query: torch.Tensor  # [num_tokens, num_heads * head_dim], rows strided as in a joined projection's result
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    inputs: StepInputs


def paged_batch(
    sequences: tuple[tuple[int, int], ...], heads: HeadShape, block_size: int, dtype: torch.dtype, seed: int = 0
) -> PagedBatch:
    """A batch of (rows, context length), those of one row first.

    Blocks are dealt out at random. Whatever is not a token of a sequence is not a number: rest of blocks,
    blocks of nobody, and what unused places of the block tables point at.
    """
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [math.ceil(context_len / block_size) for _, context_len in sequences]
    order = torch.randperm(sum(num_blocks) + 2, generator=generator).to(torch.int32)
    tables = torch.full((len(sequences), max(num_blocks) + 2), int(order[-1]), dtype=torch.int32)
    cache_shape = (len(order), block_size, heads.num_kv_heads, heads.head_dim)
    key_cache, value_cache = (torch.full(cache_shape, math.nan, dtype=dtype) for _ in range(2))
    taken = 0
    for index, (_, context_len) in enumerate(sequences):
        tables[index, : num_blocks[index]] = order[taken : taken + num_blocks[index]]
        taken += num_blocks[index]
        places = torch.arange(context_len)
        blocks = tables[index].long()[places // block_size]
        for cache in (key_cache, value_cache):
            drawn = torch.randn(context_len, *cache_shape[2:], generator=generator)
            cache[blocks, places % block_size] = drawn.to(dtype)
    inputs = step_inputs(sequences, tables)
    width = heads.num_heads * heads.head_dim
    joined = torch.randn(len(inputs.positions), width + 2 * heads.num_kv_heads * heads.head_dim, generator=generator)
    return PagedBatch(joined.to(dtype)[:, :width], key_cache, value_cache, inputs)


def step_inputs(sequences: tuple[tuple[int, int], ...], tables: torch.Tensor) -> StepInputs:
    """What a step with these (rows, context length) and block tables is given, but for token ids and slots."""
    rows = [num_rows for num_rows, _ in sequences]
    positions = [torch.arange(context_len - num_rows, context_len) for num_rows, context_len in sequences]
    num_decodes = len(list(itertools.takewhile(lambda num_rows: num_rows == 1, rows)))
    num_tokens = sum(rows)
    return StepInputs(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.cat(positions),
        slot_mapping=torch.zeros(num_tokens, dtype=torch.int64),
        query_starts=torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32),
        context_lens=torch.tensor([context_len for _, context_len in sequences], dtype=torch.int32),
        block_tables=tables,
        sampled_rows=torch.zeros(0, dtype=torch.int64),
        num_decodes=num_decodes,
        query_len_max=max(rows),
        context_len_max=max(context_len for _, context_len in sequences),
    )


def inputs_on(inputs: StepInputs, device: torch.device) -> StepInputs:
    return StepInputs(
        token_ids=inputs.token_ids.to(device),
        positions=inputs.positions.to(device),
        slot_mapping=inputs.slot_mapping.to(device),
        query_starts=inputs.query_starts.to(device),
        context_lens=inputs.context_lens.to(device),
        block_tables=inputs.block_tables.to(device),
        sampled_rows=inputs.sampled_rows.to(device),
        num_decodes=inputs.num_decodes,
        query_len_max=inputs.query_len_max,
        context_len_max=inputs.context_len_max,
    )
