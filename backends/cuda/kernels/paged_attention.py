"""Paged attention of a whole batch: decodes by the one kernel, all others by the other."""

import torch

from backends.cuda.kernels.decode_attention import decode_attention
from backends.cuda.kernels.prefill_attention import prefill_attention
from backends.cuda.kernels.tile_shapes import decode_tile, num_decode_parts, prefill_tile
from backends.step_inputs import StepInputs


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
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    num_kv_heads, head_dim = key_cache.shape[2:]
    heads = (head_dim, query.shape[1] // head_dim // num_kv_heads, query.element_size())
    num_decodes, num_seqs = inputs.num_decodes, inputs.context_lens.shape[0]
    num_compute_units, holds_large_tiles = _device_limits(query.device)
    if num_decodes:
        context_len_max = min(inputs.context_len_max, sliding_window or inputs.context_len_max)
        decode_attention(
            query,
            key_cache,
            value_cache,
            out,
            inputs.context_lens[:num_decodes],
            inputs.block_tables[:num_decodes],
            num_decode_parts(num_decodes * num_kv_heads, context_len_max, num_compute_units),
            decode_tile(*heads),
            scale=scale,
            sliding_window=sliding_window,
        )
    if num_decodes < num_seqs:
        prefill_attention(
            query,
            key_cache,
            value_cache,
            out,
            inputs.query_starts[num_decodes:],
            inputs.context_lens[num_decodes:],
            inputs.block_tables[num_decodes:],
            query.shape[0] - num_decodes,
            prefill_tile(*heads, inputs.context_len_max, holds_large_tiles),
            scale=scale,
            sliding_window=sliding_window,
        )
    return out


def _device_limits(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether a program can have 165 KiB of shared memory. A CPU, which interprets, has least."""
    if device.type == "cpu":
        return 1, False
    properties = torch.cuda.get_device_properties(device)
    # Compute capabilities 8 and 12 have less, 8.0 itself 163 KiB.
    return properties.multi_processor_count, properties.major in (9, 10)
