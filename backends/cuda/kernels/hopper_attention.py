"""Paged attention of prompts on Hopper: what `prefill_attention` computes, for the heads and blocks that fit.

A program takes tile after tile of rows, which are tokens x the heads of a group, and has three parts that run beside
each other. One warp has keys and values copied into shared memory, block by block, by the tensor memory accelerator.
Two groups of four warps each attend for half of the rows: while the tensor cores multiply, a group takes the
exponentials of its next scores, and the two take turns by themselves (as in FlashAttention-3, Shah et al. 2024,
arXiv:2407.08608).
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.prompt_tiles import PromptTiles
from backends.cuda.kernels.shared_layouts import SWIZZLED, swizzled_layout
from backends.cuda.kernels.tile_shapes import HOPPER_ROWS, LOG2_E, HopperTiles

GROUP_ROWS = gl.constexpr(64)  # of a group of four warps: what its products take
REGISTERS_OF_ATTENTION = gl.constexpr(232)
REGISTERS_OF_COPIES = gl.constexpr(40)
REGISTERS = 168  # of each thread on the average, the twelve warps of a program taken together


@gluon.jit
def _item_of(turn, HEADS: gl.constexpr):
    """Which tile and which key-value head are a program's in a turn.

    Tiles come with falling numbers of keys, and every other turn programs come in reverse: in two turns they all
    get nearly the same.
    """
    num_programs = gl.num_programs(0)
    is_even = turn % 2 == 0
    item = turn * num_programs + gl.where(is_even, gl.program_id(0), num_programs - 1 - gl.program_id(0))
    return item // HEADS, item % HEADS


@gluon.jit
def _copy_blocks(
    cache, table, index_last, first_index, column, ready, pages, first_page,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Have one head of KEYS / BLOCK_SIZE blocks copied; beyond the sequence's last block that one again."""
    mbarrier.expect(ready, KEYS * HEAD_DIM * 2)
    for page in gl.static_range(KEYS // BLOCK_SIZE):
        block = gl.load(table + gl.minimum(first_index + page, index_last))
        for half in gl.static_range(HEAD_DIM // SWIZZLED):
            place = pages.index(first_page + half * (KEYS // BLOCK_SIZE) + page)
            tma.async_copy_global_to_shared(cache, [block * BLOCK_SIZE, column + half * SWIZZLED], ready, place)


@gluon.jit
def _copy_keys_and_values(
    key_cache, value_cache, tiles, num_tiles, block_tables, table_row_stride, key_pages, value_pages,
    keys_ready, keys_free, values_ready, values_free,
    TOKENS: gl.constexpr, HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The part that fills shared memory, a tile of keys and one of values after the other."""
    num_copied = 0
    for turn in range(gl.cdiv(num_tiles * HEADS, gl.num_programs(0))):
        place, head = _item_of(turn, HEADS)
        if place < num_tiles:
            num_rows = gl.load(tiles + 4 * place + 1)
            first_position = gl.load(tiles + 4 * place + 2)
            table = block_tables + gl.load(tiles + 4 * place + 3).to(gl.int64) * table_row_stride
            index_last = (first_position + num_rows - 1) // BLOCK_SIZE
            for tile in range(gl.cdiv(first_position + gl.minimum(num_rows, TOKENS), KEYS)):
                stage, phase = num_copied % STAGES, num_copied // STAGES & 1
                first_index = tile * (KEYS // BLOCK_SIZE)
                first_page = stage * (KEYS // BLOCK_SIZE * (HEAD_DIM // SWIZZLED))
                mbarrier.wait(keys_free.index(stage), phase ^ 1)
                _copy_blocks(
                    key_cache, table, index_last, first_index, head * HEAD_DIM, keys_ready.index(stage),
                    key_pages, first_page, BLOCK_SIZE, KEYS, HEAD_DIM,
                )  # fmt: skip
                mbarrier.wait(values_free.index(stage), phase ^ 1)
                _copy_blocks(
                    value_cache, table, index_last, first_index, head * HEAD_DIM, values_ready.index(stage),
                    value_pages, first_page, BLOCK_SIZE, KEYS, HEAD_DIM,
                )  # fmt: skip
                num_copied += 1


@gluon.jit
def _clear_values(pages, first_page, num_seen, BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Zeros where a tile's slots from ``num_seen`` on are: what is there may be no number, and its weight is zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    slots = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(1, layout))
    for page in range(num_seen // BLOCK_SIZE, KEYS // BLOCK_SIZE):
        is_seen = (page * BLOCK_SIZE + slots < num_seen)[:, None]
        for half in gl.static_range(HEAD_DIM // SWIZZLED):
            place = pages.index(first_page + half * (KEYS // BLOCK_SIZE) + page)
            place.store(gl.where(is_seen, place.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def _weights(scores, first_key, positions, score_max, weight_sum, scale, MASKED: gl.constexpr):
    """Softmax as the scores [GROUP_ROWS, KEYS] stream by; the last is what earlier results shrink by."""
    layout: gl.constexpr = scores.type.layout
    if MASKED:
        keys = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout))
        scores = gl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_max = gl.maximum(score_max, gl.max(scores, 1) * scale)
    shrink = gl.exp2(score_max - new_max)
    weights = gl.exp2(scores * scale - new_max[:, None])
    return weights, new_max, weight_sum * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _attend_tiles(
    first_tile, end_tile, num_before, queries, keys, values, keys_ready, keys_free, values_ready, values_free,
    positions, scale, operand, result, weight_sum, score_max,
    KEYS: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of a tile are multiplied first, then the values of the tile before, whose weights are ``operand``.

    ``num_before`` tiles were copied before the first one of these keys.
    """
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    for tile in range(first_tile, end_tile):
        count = num_before + tile
        stage, phase = count % STAGES, count // STAGES & 1
        stage_before, phase_before = (count - 1) % STAGES, (count - 1) // STAGES & 1
        mbarrier.wait(keys_ready.index(stage), phase)
        scores = gl.zeros([GROUP_ROWS, KEYS], gl.float32, scores_layout)
        scores = warpgroup_mma(queries, keys.index(stage).permute([1, 0]), scores, use_acc=False, is_async=True)
        mbarrier.wait(values_ready.index(stage_before), phase_before)
        result = warpgroup_mma(operand, values.index(stage_before), result, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(keys_free.index(stage))
        weights, score_max, weight_sum, shrink = _weights(
            scores, tile * KEYS, positions, score_max, weight_sum, scale, MASKED
        )
        next_operand = gl.convert_layout(weights.to(queries.dtype), operand.type.layout)
        # The weights are taken while the values are multiplied. The assembler would wait for the product first, were
        # there no branch before: this one's condition is always true.
        mbarrier.wait(values_ready.index(stage_before), phase_before)
        result, _, operand, weight_sum = warpgroup_mma_wait(0, [result, operand, next_operand, weight_sum])
        mbarrier.arrive(values_free.index(stage_before))
        result = result * gl.convert_layout(shrink, gl.SliceLayout(1, result.type.layout))[:, None]
    return operand, result, weight_sum, score_max


@gluon.jit
def _attend_item(
    query, out, queries, keys, values, value_pages, keys_ready, keys_free, values_ready, values_free,
    first_row, num_rows, first_position, head, num_before, query_row_stride, out_row_stride, scale,
    FIRST: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of rows, from its row FIRST on, and one head. How many tiles of keys it has seen."""
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    result_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, result_layout, 2)
    pages_of_stage: gl.constexpr = KEYS // BLOCK_SIZE * (HEAD_DIM // SWIZZLED)

    rows = FIRST + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, copy_layout))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, copy_layout))
    inside = ((rows // GROUP < num_rows) & (rows < TOKENS * GROUP))[:, None]
    token_rows = (first_row + rows // GROUP).to(gl.int64)
    head_columns = (head * GROUP + rows % GROUP) * HEAD_DIM
    places = (token_rows * query_row_stride + head_columns)[:, None] + columns[None, :]
    queries.store(gl.load(query + places, mask=inside, other=0.0))
    fence_async_shared()

    num_tiles = gl.cdiv(first_position + gl.minimum(num_rows, TOKENS), KEYS)
    positions = first_position + (FIRST + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, scores_layout))) // GROUP
    first_stage = num_before % STAGES
    mbarrier.wait(keys_ready.index(first_stage), num_before // STAGES & 1)
    scores = gl.zeros([GROUP_ROWS, KEYS], gl.float32, scores_layout)
    scores = warpgroup_mma(queries, keys.index(first_stage).permute([1, 0]), scores, use_acc=False)
    mbarrier.arrive(keys_free.index(first_stage))
    score_max = gl.full([GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    weight_sum = gl.zeros([GROUP_ROWS], gl.float32, gl.SliceLayout(1, scores_layout))
    # Every row sees the first key, so that no maximum stays infinite.
    weights, score_max, weight_sum, _ = _weights(scores, 0, positions, score_max, weight_sum, scale, True)
    operand = gl.convert_layout(weights.to(queries.dtype), operand_layout)
    result = gl.zeros([GROUP_ROWS, HEAD_DIM], gl.float32, result_layout)

    end_unmasked = gl.minimum(gl.maximum((first_position + FIRST // GROUP + 1) // KEYS, 1), num_tiles)
    operand, result, weight_sum, score_max = _attend_tiles(
        1, end_unmasked, num_before, queries, keys, values, keys_ready, keys_free, values_ready, values_free,
        positions, scale, operand, result, weight_sum, score_max, KEYS, STAGES, False,
    )  # fmt: skip
    operand, result, weight_sum, score_max = _attend_tiles(
        end_unmasked, num_tiles, num_before, queries, keys, values, keys_ready, keys_free, values_ready, values_free,
        positions, scale, operand, result, weight_sum, score_max, KEYS, STAGES, True,
    )  # fmt: skip
    last = num_before + num_tiles - 1
    last_stage = last % STAGES
    mbarrier.wait(values_ready.index(last_stage), last // STAGES & 1)
    num_seen = first_position + num_rows - (num_tiles - 1) * KEYS
    if num_seen < KEYS:
        _clear_values(value_pages, last_stage * pages_of_stage, num_seen, BLOCK_SIZE, KEYS, HEAD_DIM)
    result = warpgroup_mma(operand, values.index(last_stage), result)
    mbarrier.arrive(values_free.index(last_stage))

    result = result / gl.convert_layout(weight_sum, gl.SliceLayout(1, result_layout))[:, None]
    # By way of the queries' memory, so that whole rows are written.
    queries.store(result.to(queries.dtype))
    places = (token_rows * out_row_stride + head_columns)[:, None] + columns[None, :]
    gl.store(out + places, queries.load(copy_layout), mask=inside)
    return num_tiles


@gluon.jit
def _attend(
    query, out, tiles, num_tiles, queries, keys, values, value_pages,
    keys_ready, keys_free, values_ready, values_free, query_row_stride, out_row_stride, scale,
    FIRST: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The part that attends, for the rows of tiles from FIRST on."""
    num_before = 0
    for turn in range(gl.cdiv(num_tiles * HEADS, gl.num_programs(0))):
        place, head = _item_of(turn, HEADS)
        if place < num_tiles:
            first_row = gl.load(tiles + 4 * place)
            num_rows = gl.load(tiles + 4 * place + 1)
            first_position = gl.load(tiles + 4 * place + 2)
            num_before += _attend_item(
                query, out, queries, keys, values, value_pages, keys_ready, keys_free, values_ready, values_free,
                first_row, num_rows, first_position, head, num_before, query_row_stride, out_row_stride, scale,
                FIRST, GROUP, TOKENS, BLOCK_SIZE, KEYS, HEAD_DIM, STAGES,
            )  # fmt: skip


@KernelLauncher
@gluon.jit(
    do_not_specialize=["table_row_stride"],
    do_not_specialize_on_alignment=["tiles", "num_tiles", "block_tables"],
)
def _hopper_attention(
    query, key_cache, value_cache, out, tiles, num_tiles, block_tables,
    query_row_stride, out_row_stride, table_row_stride, scale,
    GROUP: gl.constexpr, TOKENS: gl.constexpr, HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Programs share out the tiles of TOKENS tokens x GROUP heads, each of them for each key-value head."""
    element: gl.constexpr = key_cache.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    num_pages: gl.constexpr = STAGES * (KEYS // BLOCK_SIZE) * (HEAD_DIM // SWIZZLED)
    queries = gl.allocate_shared_memory(element, [2, GROUP_ROWS, HEAD_DIM], swizzled)
    key_pages = gl.allocate_shared_memory(element, [num_pages, BLOCK_SIZE, SWIZZLED], swizzled)
    value_pages = gl.allocate_shared_memory(element, [num_pages, BLOCK_SIZE, SWIZZLED], swizzled)
    keys = key_pages._reinterpret(element, [STAGES, KEYS, HEAD_DIM], swizzled)
    values = value_pages._reinterpret(element, [STAGES, KEYS, HEAD_DIM], swizzled)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=2)
        mbarrier.init(values_ready.index(stage), count=1)
        mbarrier.init(values_free.index(stage), count=2)
    fence_async_shared()
    tiles_there = gl.load(num_tiles)
    gl.warp_specialize(
        [
            (_attend, (
                query, out, tiles, tiles_there, queries.index(0), keys, values, value_pages,
                keys_ready, keys_free, values_ready, values_free, query_row_stride, out_row_stride, scale,
                0, GROUP, TOKENS, HEADS, BLOCK_SIZE, KEYS, HEAD_DIM, STAGES,
            )),
            (_attend, (
                query, out, tiles, tiles_there, queries.index(1), keys, values, value_pages,
                keys_ready, keys_free, values_ready, values_free, query_row_stride, out_row_stride, scale,
                GROUP_ROWS, GROUP, TOKENS, HEADS, BLOCK_SIZE, KEYS, HEAD_DIM, STAGES,
            )),
            (_copy_keys_and_values, (
                key_cache, value_cache, tiles, tiles_there, block_tables, table_row_stride, key_pages, value_pages,
                keys_ready, keys_free, values_ready, values_free,
                TOKENS, HEADS, BLOCK_SIZE, KEYS, HEAD_DIM, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS_OF_ATTENTION, REGISTERS_OF_COPIES],
    )  # fmt: skip


def hopper_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    tiles: PromptTiles,
    block_tables: torch.Tensor,
    shape: HopperTiles,
    num_programs: int,
    *,
    scale: float,
) -> None:
    """As `prefill_attention`, without a sliding window, on contiguous caches, for heads that `fit_hopper_tiles`.

    Tiles are of HOPPER_ROWS // (heads of a group) tokens. ``num_programs`` that run at the same time share them out.
    """
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    group = query.shape[1] // head_dim // num_kv_heads
    layout = swizzled_layout()
    slots = [cache.view(-1, num_kv_heads * head_dim) for cache in (key_cache, value_cache)]
    blocks = [TensorDescriptor.from_tensor(cache, [block_size, SWIZZLED.value], layout) for cache in slots]
    strides = (query.stride(0), out.stride(0), block_tables.stride(0))
    tokens = HOPPER_ROWS // group
    _hopper_attention(
        (min(num_programs, tiles.num_places * num_kv_heads), 1, 1),
        (query, *blocks, out, tiles.tiles, tiles.num_tiles, block_tables, *strides, scale * LOG2_E),
        (group, tokens, num_kv_heads, block_size, shape.num_keys, head_dim, shape.num_stages),
        num_warps=4,
        registers_max=REGISTERS,
    )
