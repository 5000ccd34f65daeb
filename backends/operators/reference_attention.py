"""Attention over the paged KV cache in plain torch, for batches of decodes and prompts.

Nothing is read but the slots of a sequence's own tokens: whatever other blocks hold, be it not a number,
cannot reach it. What depends on the step but not on the layer is prepared once for all layers.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as functional

from backends.step_inputs import StepInputs

# On a CPU, decodes of one go: what is gathered of them is still in a core's cache when it is multiplied.
_TOKENS_OF_BUCKET_MAX = 2048
# Elsewhere, of one go: what is gathered of them has to fit beside all else.
_TOKENS_OF_DEVICE_BUCKET_MAX = 1 << 18


class Gathering:
    """Room for the K and V of one bucket and layer, used again by the next: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._room: torch.Tensor | None = None

    def gather(self, caches: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
        """``cache[rows]`` for K and V, both [num_rows, width], good until the next call."""
        num_rows, width = rows.shape[0], caches[0].shape[1]
        room = self._room
        if room is None or room.shape[1] < num_rows or room.shape[2] != width or room.dtype != caches[0].dtype:
            room = self._room = caches[0].new_empty(2, num_rows, width)
        places = zip(caches, room[:, :num_rows].unbind(), strict=True)
        return [torch.index_select(cache, 0, rows, out=place) for cache, place in places]


class DecodeBucket:
    """Decodes of about the same context, padded to the longest."""

    def __init__(self, rows: torch.Tensor | None, slots: torch.Tensor, seen: torch.Tensor) -> None:
        """``slots`` pads a sequence with its own first slot, which ``seen`` denies; both are [num_rows, length].

        ``rows`` are numbers of rows of the batch; None: its first rows, all of them.
        """
        self.rows = rows
        self.num_rows, self.length = slots.shape
        self.seen = seen[:, None, None, :]
        self._slots = slots
        self._head_rows: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None

    def head_rows(self, num_kv_heads: int) -> torch.Tensor:
        """[num_rows * num_kv_heads * length]: rows of a cache that is seen as one row for each slot and head."""
        if self._head_rows is None:
            heads = torch.arange(num_kv_heads, device=self._slots.device).unsqueeze(-1)
            self._head_rows = (self._slots.unsqueeze(1) * num_kv_heads + heads).flatten()
        return self._head_rows

    def bias(self, num_kv_heads: int) -> torch.Tensor:
        """float32 [num_rows * num_kv_heads, 1, length]: 0 where a row sees, minus infinity elsewhere."""
        if self._bias is None:
            bias = torch.zeros(self.seen.shape, device=self.seen.device).masked_fill_(~self.seen, float("-inf"))
            self._bias = bias.expand(-1, num_kv_heads, -1, -1).reshape(-1, 1, self.length)
        return self._bias


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
    gathering: Gathering = field(default_factory=Gathering)


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
        _decode(query, (keys, values), bucket, inputs.gathering, scale, result)
    for sequence in inputs.prefills:
        _prefill(query, keys, values, sequence, scale, result)
    return result.flatten(-2)


def _decode(
    query: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    bucket: DecodeBucket,
    gathering: Gathering,
    scale: float,
    result: torch.Tensor,
) -> None:
    """One call for all rows: the query heads of a group stand where a prompt's rows would."""
    _, num_kv_heads, head_dim = caches[0].shape
    rows = query[: bucket.num_rows] if bucket.rows is None else query.index_select(0, bucket.rows)
    by_head = (caches[0].view(-1, head_dim), caches[1].view(-1, head_dim))
    shape = (bucket.num_rows * num_kv_heads, bucket.length, head_dim)
    gathered = gathering.gather(by_head, bucket.head_rows(num_kv_heads))
    keys, values = (part.view(shape).to(query.dtype) for part in gathered)
    grouped = rows.reshape(shape[0], -1, head_dim)
    if query.dtype == torch.float32:
        output = _products(grouped, keys, values, bucket.bias(num_kv_heads), scale)
    else:
        output = _fused(grouped, keys, values, bucket, scale)
    output = output.reshape(rows.shape)
    if bucket.rows is None:
        result[: bucket.num_rows] = output
    else:
        result.index_copy_(0, bucket.rows, output)


def _products(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention spelled out: of so few rows, torch's own takes longer on a CPU. All are [num_heads, ..., head_dim]."""
    scores = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), values)


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bucket: DecodeBucket, scale: float
) -> torch.Tensor:
    """The same without rounding scores to a type of 16 bits."""
    query, keys, values = (torch.unflatten(part, 0, (bucket.num_rows, -1)) for part in (query, keys, values))
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=bucket.seen, scale=scale)


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
    """On a CPU some of about the same context go together; elsewhere as many as fit, without a look at contexts."""
    num_decodes = inputs.num_decodes
    context_lens = inputs.context_lens[:num_decodes]
    if context_lens.device.type != "cpu":
        length_max = min(inputs.context_len_max, sliding_window or inputs.context_len_max)
        num_rows = max(1, _TOKENS_OF_DEVICE_BUCKET_MAX // length_max)
        if num_decodes <= num_rows:
            return (_decode_bucket(inputs, None, length_max, block_size, sliding_window),)
        rows = torch.arange(num_decodes, device=context_lens.device)
        return tuple(
            _decode_bucket(inputs, rows[first : first + num_rows], length_max, block_size, sliding_window)
            for first in range(0, num_decodes, num_rows)
        )
    lengths = [min(length, sliding_window or length) for length in context_lens.tolist()]
    return tuple(
        _decode_bucket(inputs, torch.tensor(rows), max(lengths[row] for row in rows), block_size, sliding_window)
        for rows in rows_together(lengths)
    )


def rows_together(lengths: list[int]) -> list[list[int]]:
    """Rows by length, as many to each list as have ``_TOKENS_OF_BUCKET_MAX`` tokens when padded to its longest.

    The longest of a list is less than twice as long as its shortest.
    """
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[found[-1][0]] if found else 0
        fits = found and (len(found[-1]) + 1) * longest <= _TOKENS_OF_BUCKET_MAX and 2 * lengths[row] > longest
        if fits:
            found[-1].append(row)
        else:
            found.append([row])
    return found


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
    return DecodeBucket(rows, slots, seen)


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
