"""Attention over the paged KV cache in plain torch, for batches of decodes and prompts.

Nothing is read but the slots of a sequence's own tokens: whatever other blocks hold, be it not a number,
cannot reach it. What depends on the step but not on the layer is prepared once for all layers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as functional

from backends.step_inputs import StepInputs


class Gathering:
    """Room for one layer's gathered K or V, used again by the next: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None

    def gather(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """``cache[slots]``: [num_slots, num_kv_heads, head_dim], good until the next call."""
        shape = (slots.shape[0], *cache.shape[1:])
        if self._room is None or self._room.shape != shape or self._room.dtype != cache.dtype:
            self._room = cache.new_empty(shape)
        return torch.index_select(cache, 0, slots, out=self._room)


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decodes of about the same context, padded to the longest."""

    rows: torch.Tensor | None  # [num_rows] of the batch; None: its first rows, all of them
    num_rows: int
    slots: torch.Tensor  # [num_rows * length]; what pads a sequence is its own first slot
    mask: torch.Tensor  # bool [num_rows, 1, 1, length]
    keys: Gathering = field(default_factory=Gathering)
    values: Gathering = field(default_factory=Gathering)


@dataclass(frozen=True, slots=True)
class PrefillSequence:
    """One sequence of several rows."""

    first_row: int
    end_row: int
    slots: torch.Tensor  # [num_keys]: the slots of all tokens that any of its rows sees
    causal: bool  # rows and keys are the same tokens, and each row sees all before it
    mask: torch.Tensor | None  # bool [num_rows, num_keys], where not causal


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """One step's batch as ``attention`` wants it, the same for all layers with that sliding window."""

    decodes: tuple[DecodeBucket, ...]
    prefills: tuple[PrefillSequence, ...]


def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: StepInputs | PreparedAttention,
    *,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Causal attention of each row over its sequence's tokens in the cache: [num_tokens, num_heads * head_dim].

    ``query`` is of that shape; the caches are [num_blocks, block_size, num_kv_heads, head_dim] and hold this
    step's K and V already. Query heads share key-value heads in consecutive groups. With a
    ``sliding_window`` a row sees so many tokens, itself the last; 0: all.
    """
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    if isinstance(inputs, StepInputs):
        inputs = prepare_attention(inputs, block_size=block_size, sliding_window=sliding_window)
    keys, values = key_cache.view(-1, num_kv_heads, head_dim), value_cache.view(-1, num_kv_heads, head_dim)
    query = torch.unflatten(query, -1, (-1, head_dim))
    result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for bucket in inputs.decodes:
        _decode(query, keys, values, bucket, scale, result)
    for sequence in inputs.prefills:
        _prefill(query, keys, values, sequence, scale, result)
    return result.flatten(-2)


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bucket: DecodeBucket,
    scale: float,
    result: torch.Tensor,
) -> None:
    """One call for all rows: the query heads of a group stand where a prompt's rows would."""
    _, num_kv_heads, head_dim = keys.shape
    rows = query[: bucket.num_rows] if bucket.rows is None else query.index_select(0, bucket.rows)
    grouped = torch.unflatten(rows, 1, (num_kv_heads, -1))
    shape = (bucket.num_rows, -1, num_kv_heads, head_dim)
    gathered_keys = bucket.keys.gather(keys, bucket.slots).view(shape).transpose(1, 2).to(query.dtype)
    gathered_values = bucket.values.gather(values, bucket.slots).view(shape).transpose(1, 2).to(query.dtype)
    output = functional.scaled_dot_product_attention(
        grouped, gathered_keys, gathered_values, attn_mask=bucket.mask, scale=scale
    ).flatten(1, 2)
    if bucket.rows is None:
        result[: bucket.num_rows] = output
    else:
        result.index_copy_(0, bucket.rows, output)


def _prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sequence: PrefillSequence,
    scale: float,
    result: torch.Tensor,
) -> None:
    output = functional.scaled_dot_product_attention(
        query[sequence.first_row : sequence.end_row].transpose(0, 1).unsqueeze(0),
        keys.index_select(0, sequence.slots).transpose(0, 1).unsqueeze(0).to(query.dtype),
        values.index_select(0, sequence.slots).transpose(0, 1).unsqueeze(0).to(query.dtype),
        attn_mask=sequence.mask,
        is_causal=sequence.causal,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    result[sequence.first_row : sequence.end_row] = output.squeeze(0).transpose(0, 1)


def prepare_attention(inputs: StepInputs, *, block_size: int, sliding_window: int = 0) -> PreparedAttention:
    """Slots and masks of a step. Waits for the device only where the batch has prompts."""
    num_decodes, num_seqs = inputs.num_decodes, inputs.context_lens.shape[0]
    decodes = _decode_buckets(inputs, block_size, sliding_window) if num_decodes else ()
    if num_decodes == num_seqs:
        return PreparedAttention(decodes, ())
    starts = inputs.query_starts[num_decodes:].tolist()
    context_lens = inputs.context_lens[num_decodes:].tolist()
    prefills = tuple(
        _prefill_sequence(
            inputs, num_decodes + i, starts[i], starts[i + 1], context_lens[i], block_size, sliding_window
        )
        for i in range(num_seqs - num_decodes)
        if starts[i + 1] > starts[i]
    )
    return PreparedAttention(decodes, prefills)


def _decode_buckets(inputs: StepInputs, block_size: int, sliding_window: int) -> tuple[DecodeBucket, ...]:
    """On a CPU, contexts that differ less than twofold go together; elsewhere all do, without a look at them."""
    num_decodes = inputs.num_decodes
    context_lens = inputs.context_lens[:num_decodes]
    if context_lens.device.type != "cpu":
        return (_decode_bucket(inputs, None, inputs.context_len_max, block_size, sliding_window),)
    lengths = context_lens.tolist()
    rows_by_size: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows_by_size.setdefault(length.bit_length(), []).append(row)
    if len(rows_by_size) == 1:
        return (_decode_bucket(inputs, None, max(lengths), block_size, sliding_window),)
    return tuple(
        _decode_bucket(inputs, torch.tensor(rows), max(lengths[row] for row in rows), block_size, sliding_window)
        for rows in rows_by_size.values()
    )


def _decode_bucket(
    inputs: StepInputs, rows: torch.Tensor | None, length_max: int, block_size: int, sliding_window: int
) -> DecodeBucket:
    """Keys of each row: the last ``sliding_window`` tokens of its context, or all."""
    context_lens, tables = inputs.context_lens[: inputs.num_decodes], inputs.block_tables[: inputs.num_decodes]
    if rows is not None:
        context_lens, tables = context_lens[rows], tables[rows]
    length_max = min(length_max, sliding_window) if sliding_window else length_max
    lengths = context_lens.clamp(max=length_max)
    places = torch.arange(length_max, device=tables.device, dtype=torch.int64)
    seen = places < lengths.unsqueeze(1)
    positions = torch.where(seen, places + (context_lens - lengths).unsqueeze(1), (context_lens - lengths).unsqueeze(1))
    blocks = tables.gather(1, positions // block_size).to(torch.int64)
    slots = blocks * block_size + positions % block_size
    return DecodeBucket(rows, context_lens.shape[0], slots.flatten(), seen[:, None, None, :])


def _prefill_sequence(
    inputs: StepInputs,
    index: int,
    first_row: int,
    end_row: int,
    context_len: int,
    block_size: int,
    sliding_window: int,
) -> PrefillSequence:
    num_rows = end_row - first_row
    first_position = context_len - num_rows
    first_key = max(0, first_position - sliding_window + 1) if sliding_window else 0
    device = inputs.block_tables.device
    key_positions = torch.arange(first_key, context_len, device=device)
    blocks = inputs.block_tables[index].gather(0, key_positions // block_size).to(torch.int64)
    slots = blocks * block_size + key_positions % block_size
    if first_position == 0 and (sliding_window == 0 or sliding_window >= context_len):
        return PrefillSequence(first_row, end_row, slots, causal=True, mask=None)
    row_positions = torch.arange(first_position, context_len, device=device).unsqueeze(1)
    mask = key_positions <= row_positions
    if sliding_window:
        mask &= key_positions > row_positions - sliding_window
    return PrefillSequence(first_row, end_row, slots, causal=False, mask=mask)
