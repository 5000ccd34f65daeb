"""One tile of queries against one tile of keys: what both attention kernels repeat.

Softmax is taken while keys stream by (Milakov and Gimelshein 2018, arXiv:1805.02867), as FlashAttention does
(Dao 2023, arXiv:2307.08691). Exponentials are powers of two; the scale of the scores holds the factor log2(e).
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import triton
import triton.language as tl


@triton.jit
def blocks_of(table, first_key, first_seen_key, end_key, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Blocks [KEYS] of the keys from ``first_key`` on, as far as they are in [first_seen_key, end_key)."""
    key_positions = first_key + tl.arange(0, KEYS)
    is_seen = (key_positions >= first_seen_key) & (key_positions < end_key)
    return tl.load(table + key_positions // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)


@triton.jit
def attend(
    query,
    query_positions,
    key_head,
    value_head,
    blocks,
    first_key,
    first_seen_key,
    end_key,
    key_block_stride,
    key_slot_stride,
    value_block_stride,
    value_slot_stride,
    scale,
    result,
    weight_sum,
    score_max,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys from ``first_key`` on to ``result`` [ROWS, COLUMNS], ``weight_sum`` and ``score_max`` [ROWS].

    ``MASKED``: some rows do not see some of the keys. Keys outside [first_seen_key, end_key) are not even
    read: memory of tokens that are not the sequence's may hold anything.
    """
    key_positions = first_key + tl.arange(0, KEYS)
    columns = tl.arange(0, COLUMNS)
    if MASKED:
        is_seen = (key_positions >= first_seen_key) & (key_positions < end_key)
        inside = is_seen[:, None] & (columns < HEAD_DIM)[None, :]
    else:
        inside = (columns < HEAD_DIM)[None, :]
    offsets = key_positions % BLOCK_SIZE
    key_places = blocks * key_block_stride + offsets * key_slot_stride
    value_places = blocks * value_block_stride + offsets * value_slot_stride
    if MASKED or COLUMNS != HEAD_DIM:
        keys = tl.load(key_head + key_places[:, None] + columns[None, :], mask=inside, other=0.0)
        values = tl.load(value_head + value_places[:, None] + columns[None, :], mask=inside, other=0.0)
    else:
        keys = tl.load(key_head + key_places[:, None] + columns[None, :])
        values = tl.load(value_head + value_places[:, None] + columns[None, :])
    keys, values = keys.to(query.dtype), values.to(query.dtype)

    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if MASKED:
        visible = is_seen[None, :] & (key_positions[None, :] <= query_positions[:, None])
        if WINDOW > 0:
            visible = visible & (key_positions[None, :] > query_positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(score_max, tl.max(scores, axis=1) * scale)
    # A row that has seen no key yet has the maximum -inf, and -inf less -inf is not a number.
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(score_max - finite_max)
    weights = tl.exp2(scores * scale - finite_max[:, None])
    weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
    result = tl.dot(weights.to(query.dtype), values, result * shrink[:, None], input_precision="ieee")
    return result, weight_sum, new_max


@triton.jit
def attend_range(
    query,
    query_positions,
    key_head,
    value_head,
    table,
    first_key,
    end_key,
    first_seen_key,
    end_unmasked_key,
    key_block_stride,
    key_slot_stride,
    value_block_stride,
    value_slot_stride,
    scale,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPARES_MASKS: tl.constexpr,
):
    """All keys from ``first_key``, a multiple of KEYS, to ``end_key``; those before ``end_unmasked_key`` unmasked."""
    result = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    weight_sum = tl.zeros((ROWS,), dtype=tl.float32)
    score_max = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    # A tile's blocks are looked up while the tile before it is computed. Were they looked up where they are used, no
    # keys would be on their way before that: the compiler then holds one tile at a time.
    blocks = blocks_of(table, first_key, first_seen_key, end_key, BLOCK_SIZE, KEYS)
    if SPARES_MASKS:
        for start in range(first_key, end_unmasked_key, KEYS):
            next_blocks = blocks_of(table, start + KEYS, first_seen_key, end_key, BLOCK_SIZE, KEYS)
            result, weight_sum, score_max = attend(
                query, query_positions, key_head, value_head, blocks, start, first_seen_key, end_key,
                key_block_stride, key_slot_stride, value_block_stride, value_slot_stride, scale,
                result, weight_sum, score_max, BLOCK_SIZE, HEAD_DIM, COLUMNS, KEYS, WINDOW, False,
            )  # fmt: skip
            blocks = next_blocks
        first_key = tl.maximum(first_key, end_unmasked_key)
    for start in range(first_key, end_key, KEYS):
        next_blocks = blocks_of(table, start + KEYS, first_seen_key, end_key, BLOCK_SIZE, KEYS)
        result, weight_sum, score_max = attend(
            query, query_positions, key_head, value_head, blocks, start, first_seen_key, end_key,
            key_block_stride, key_slot_stride, value_block_stride, value_slot_stride, scale,
            result, weight_sum, score_max, BLOCK_SIZE, HEAD_DIM, COLUMNS, KEYS, WINDOW, True,
        )  # fmt: skip
        blocks = next_blocks
    return result, weight_sum, score_max
