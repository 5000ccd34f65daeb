"""Paged attention of a whole batch: decodes by the one kernel, all others by the other."""

from dataclasses import dataclass

import torch

from backends.cuda.kernels.decode_attention import DecodeShares, decode_attention, share_out
from backends.cuda.kernels.device_properties import num_compute_units
from backends.cuda.kernels.prompt_attention import PromptRows, prompt_attention
from backends.cuda.kernels.tile_shapes import decode_tile, num_programs_wanted
from backends.step_inputs import StepInputs


@dataclass(slots=True)
class StepAttention:
    """What all layers of a step with the same window have in common."""

    inputs: StepInputs
    num_decodes: int
    num_seqs: int
    decode_context_lens: torch.Tensor  # [num_decodes]
    decode_block_tables: torch.Tensor  # [num_decodes, num_blocks_max]
    prompts: PromptRows
    decode_shares: DecodeShares | None = None  # made by the first layer, which knows how many heads there are


def prepare_attention(inputs: StepInputs, *, block_size: int, sliding_window: int = 0) -> StepAttention:
    """Once for each step. Block size and window are not needed: ``attention`` has them from the cache and the layer."""
    num_decodes, num_tokens = inputs.num_decodes, inputs.positions.shape[0]
    is_captured = inputs.decode_count is not None
    prompts = PromptRows(
        query_starts=inputs.query_starts[num_decodes:],
        context_lens=inputs.context_lens[num_decodes:],
        block_tables=inputs.block_tables[num_decodes:],
        num_rows_max=num_tokens if is_captured else num_tokens - num_decodes,
        # A captured step is a small one; how far its prompts have come is not known.
        context_len_max=num_tokens if is_captured else inputs.context_len_max,
    )
    return StepAttention(
        inputs=inputs,
        num_decodes=num_decodes,
        num_seqs=inputs.context_lens.shape[0],
        decode_context_lens=inputs.context_lens[:num_decodes],
        decode_block_tables=inputs.block_tables[:num_decodes],
        prompts=prompts,
    )


def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: StepInputs | StepAttention,
    *,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Causal attention of each row over its sequence's tokens: [num_tokens, num_heads * head_dim].

    Launches depend on sizes that the host knows, never on what is on the device.
    """
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    if isinstance(inputs, StepInputs):
        inputs = prepare_attention(inputs, block_size=block_size, sliding_window=sliding_window)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    heads = (head_dim, query.shape[1] // head_dim // num_kv_heads, query.element_size())
    num_decodes = inputs.num_decodes
    if num_decodes:
        if inputs.decode_shares is None:
            num_programs = num_programs_wanted(num_compute_units(query.device))
            inputs.decode_shares = share_out(
                inputs.decode_context_lens, num_kv_heads, num_programs, sliding_window=sliding_window
            )
        decode_attention(
            query,
            key_cache,
            value_cache,
            out,
            inputs.decode_context_lens,
            inputs.decode_block_tables,
            inputs.decode_shares,
            decode_tile(*heads),
            scale=scale,
            sliding_window=sliding_window,
        )
    if num_decodes < inputs.num_seqs:
        prompt_attention(query, key_cache, value_cache, out, inputs.prompts, scale=scale, sliding_window=sliding_window)
    return out
