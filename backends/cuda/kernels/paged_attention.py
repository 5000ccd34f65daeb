"""Paged attention of a whole batch: decodes by the one kernel, all others by another."""

import torch

from backends.cuda.kernels.decode_attention import decode_attention
from backends.cuda.kernels.gathered_attention import gathered_attention
from backends.cuda.kernels.prefill_attention import prefill_attention
from backends.cuda.kernels.tile_shapes import decode_tile, num_decode_parts, prefill_tile
from backends.step_inputs import StepInputs

HEAD_DIM_MAX = 256
_GATHERED_ROWS_MIN = 512
_GATHERED_BYTES_MAX = 1 << 29


def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: StepInputs,
    *,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Causal attention of each row over its sequence's tokens: [num_tokens, num_heads * head_dim].

    Launches depend on sizes that the host knows, never on what is on the device.
    """
    num_decodes, num_seqs = inputs.num_decodes, inputs.context_lens.shape[0]
    if num_decodes < num_seqs:
        out = _prefills(query, key_cache, value_cache, inputs, scale, sliding_window)
    else:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_decodes:
        num_kv_heads, head_dim = key_cache.shape[2:]
        num_parts = num_decode_parts(
            num_decodes * num_kv_heads,
            min(inputs.context_len_max, sliding_window or inputs.context_len_max),
            num_compute_units(query.device),
        )
        decode_attention(
            query,
            key_cache,
            value_cache,
            out,
            inputs.context_lens[:num_decodes],
            inputs.block_tables[:num_decodes],
            num_parts,
            decode_tile(head_dim, query.shape[1] // head_dim // num_kv_heads, query.element_size()),
            scale=scale,
            sliding_window=sliding_window,
        )
    return out


def _prefills(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: StepInputs,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """A result of which the rows of decodes are not set."""
    num_decodes = inputs.num_decodes
    where = (
        inputs.query_starts[num_decodes:],
        inputs.context_lens[num_decodes:],
        inputs.block_tables[num_decodes:],
    )
    if _is_worth_gathering(query, key_cache, inputs):
        lens = (inputs.query_len_max, inputs.context_len_max)
        return gathered_attention(
            query, key_cache, value_cache, *where, *lens, scale=scale, sliding_window=sliding_window
        )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_kv_heads, head_dim = key_cache.shape[2:]
    prefill_attention(
        query,
        key_cache,
        value_cache,
        out,
        *where,
        query.shape[0] - num_decodes,
        prefill_tile(head_dim, query.shape[1] // head_dim // num_kv_heads, query.element_size()),
        scale=scale,
        sliding_window=sliding_window,
    )
    return out


def _is_worth_gathering(query: torch.Tensor, key_cache: torch.Tensor, inputs: StepInputs) -> bool:
    """Long prompts of types and head sizes that torch's flash attention knows, and a copy of bounded size."""
    num_kv_heads, head_dim = key_cache.shape[2:]
    known = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
    num_prefills = inputs.context_lens.shape[0] - inputs.num_decodes
    copied_bytes = 2 * num_prefills * inputs.context_len_max * num_kv_heads * head_dim * query.element_size()
    return (
        known
        and inputs.query_len_max >= _GATHERED_ROWS_MIN
        and copied_bytes <= _GATHERED_BYTES_MAX
        and torch.backends.cuda.is_flash_attention_available()
    )


def num_compute_units(device: torch.device) -> int:
    """Multiprocessors of the device; 1 for a CPU, where kernels are only interpreted."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
