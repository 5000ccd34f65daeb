"""Paged attention of a whole batch: decodes by the one kernel, all others by the other."""

from dataclasses import dataclass
from functools import cache

import torch

from backends.cuda.kernels.decode_attention import DecodeShares, decode_attention, share_out
from backends.cuda.kernels.prefill_attention import prefill_attention
from backends.cuda.kernels.tile_shapes import decode_tile, num_programs_wanted, prefill_tile
from backends.step_inputs import StepInputs


@dataclass(slots=True)
class StepAttention:
    """What all layers of a step with the same window have in common."""

    inputs: StepInputs
    num_decodes: int
    num_seqs: int
    num_prompt_rows_max: int
    prompt_context_len_max: int
    decode_context_lens: torch.Tensor  # [num_decodes]
    decode_block_tables: torch.Tensor  # [num_decodes, num_blocks_max]
    prompt_query_starts: torch.Tensor  # [num_prompts + 1], rows of the whole step
    prompt_context_lens: torch.Tensor  # [num_prompts]
    prompt_block_tables: torch.Tensor  # [num_prompts, num_blocks_max]
    decode_shares: DecodeShares | None = None  # made by the first layer, which knows how many heads there are


def prepare_attention(inputs: StepInputs, *, block_size: int, sliding_window: int = 0) -> StepAttention:
    """Once for each step. Block size and window are not needed: ``attention`` has them from the cache and the layer."""
    num_decodes, num_tokens = inputs.num_decodes, inputs.positions.shape[0]
    return StepAttention(
        inputs=inputs,
        num_decodes=num_decodes,
        num_seqs=inputs.context_lens.shape[0],
        num_prompt_rows_max=num_tokens - (0 if inputs.decode_count is not None else num_decodes),
        # A captured step is a small one; how far its prompts have come is not known.
        prompt_context_len_max=inputs.context_len_max if inputs.decode_count is None else num_tokens,
        decode_context_lens=inputs.context_lens[:num_decodes],
        decode_block_tables=inputs.block_tables[:num_decodes],
        prompt_query_starts=inputs.query_starts[num_decodes:],
        prompt_context_lens=inputs.context_lens[num_decodes:],
        prompt_block_tables=inputs.block_tables[num_decodes:],
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
    num_compute_units, holds_large_tiles = _device_limits(query.device)
    if num_decodes:
        if inputs.decode_shares is None:
            num_programs = num_programs_wanted(num_compute_units)
            lens = inputs.decode_context_lens
            inputs.decode_shares = share_out(
                lens,
                num_kv_heads,
                num_programs,
                sliding_window=sliding_window,
                are_all_there=inputs.inputs.decode_count is None,
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
        prefill_attention(
            query,
            key_cache,
            value_cache,
            out,
            inputs.prompt_query_starts,
            inputs.prompt_context_lens,
            inputs.prompt_block_tables,
            inputs.num_prompt_rows_max,
            prefill_tile(*heads, inputs.prompt_context_len_max, holds_large_tiles),
            scale=scale,
            sliding_window=sliding_window,
        )
    return out


@cache
def _device_limits(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether a program can have 165 KiB of shared memory. A CPU, which interprets, has least."""
    if device.type == "cpu":
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    # Compute capabilities 8 and 12 have less, 8.0 itself 163 KiB.
    return properties.multi_processor_count, properties.major in (9, 10)
